"""Steps that end alike on all ranks: what fails on one is raised on each, and what they say must be the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halovae.comm import Comm
from halovae.errors import DisagreementError, RankFailedError


@contextmanager
def together(comm: Comm) -> Iterator[dict[str, Any]]:
    """A step that ends alike on all ranks.

    Yields:
        An empty dict; what a rank puts in is compared with the others'.

    Raises:
        RankFailedError: on the ranks on which nothing was wrong.
        DisagreementError: on all ranks, with both values.
    """
    said: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        yield said
    except Exception as error:
        problem = error
    everyone = comm.all_gather_object((problem and str(problem), {name: str(value) for name, value in said.items()}))
    if problem:
        raise problem
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise RankFailedError(rank, message)
    _compare([other for _, other in everyone])


def _compare(everyone: list[dict[str, str]]) -> None:
    for rank, other in enumerate(everyone):
        for name, value in other.items():
            if value != everyone[0].get(name):
                raise DisagreementError(
                    f"ranks disagree on {name}: rank 0 has {everyone[0].get(name)}, rank {rank} has {value}; "
                    "call with the same on all ranks"
                )
