"""Steps that end alike on all ranks: what fails on one is raised on each, and what they say must be the same."""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halovae.base import verdicts
from halovae.base.errors import DisagreementError, failed_elsewhere
from halovae.comm import Comm, Forgone, Start

_LOOKED_AT = 64
_NEAR = 0.05
"""Relative L2 distance that two ranks may differ by: a denoiser's rounding is far below, another seed far above."""


@dataclass(frozen=True)
class Glance:
    """Some values of a tensor, spread over all of it: enough to tell another picture, not another pixel."""

    values: tuple[float, ...]

    @classmethod
    def at(cls, tensor: Tensor) -> Glance:
        """Waits for the tensor to be computed."""
        if tensor.is_meta or tensor.is_complex() or not tensor.numel():
            return cls(())
        seen = (tensor[_places(tensor.shape, tensor.device)] if tensor.ndim else tensor.reshape(1)).cpu().double()
        return cls(tuple(torch.nan_to_num(seen, nan=0.0, posinf=1.0, neginf=-1.0).tolist()))

    def is_near(self, other: Glance) -> bool:
        if len(self.values) != len(other.values):
            return False
        return math.dist(self.values, other.values) <= _NEAR * max(math.hypot(*self.values), math.hypot(*other.values))

    def __str__(self) -> str:
        return f"values like {', '.join(f'{value:.4g}' for value in self.values[:3])}"


@functools.lru_cache(maxsize=16)
def _places(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Indices along each dimension. A device would take a millisecond to be asked for them in each call."""
    # A stride without a common factor with any size: not all in one column.
    places = torch.arange(_LOOKED_AT, device="cpu") * 2_654_435_761 % shape.numel()
    return torch.unravel_index(places.to(device), shape)


@dataclass(frozen=True)
class Tally:
    """How many things a rank remembers that all ranks have settled together, and will not ask each other again.

    One that was interrupted may have missed the last of them. Where ranks differ, all forget.
    """

    count: int
    forget: Callable[[], None] | None = field(default=None, compare=False)


Message = str | Glance | Tally


@contextmanager
def one_call(comm: Comm, start: Start | None = None) -> Iterator[None]:
    """A call on all ranks: an exception on one of them ends it on each, at once, and the next call finds all in order.

    Args:
        start: what begins with it, where a rank may forgo that.

    Raises:
        RankFailedError: on the ranks on which nothing was wrong.
        Forgone: a rank does not begin it. To the others there was no such call.
    """
    outer = comm.starting
    comm.starting = start
    try:
        comm.begin()
        yield
        comm.finish()
    except Forgone:
        raise
    except BaseException as error:
        comm.fail(error)
        raise
    finally:
        comm.starting = outer


@contextmanager
def together(comm: Comm) -> Iterator[dict[str, Any]]:
    """A step that ends alike on all ranks. It has no exchange in it: one that failed before that would be waited for.

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
    told = problem and (str(problem), "".join(traceback.format_exception(problem)), type(problem).__name__)
    words = {name: _message(value) for name, value in said.items()}
    everyone = comm.all_gather_object((told, words))
    if problem:
        raise problem
    for rank, (failure, _) in enumerate(everyone):
        if failure is not None:
            raise failed_elsewhere(rank, *failure)
    _compare([other for _, other in everyone])
    for name, value in said.items():
        if isinstance(value, Tally) and value.forget and len({other[name] for _, other in everyone}) > 1:
            value.forget()


def _message(value: Any) -> Message:
    if isinstance(value, Tally):
        return Tally(value.count)
    return value if isinstance(value, Glance) else str(value)


def _compare(everyone: list[dict[str, Message]]) -> None:
    for rank, other in enumerate(everyone):
        for name, value in other.items():
            first = everyone[0].get(name)
            if isinstance(value, Glance) and isinstance(first, Glance) and value.is_near(first):
                continue
            if isinstance(value, Tally) and isinstance(first, Tally):
                continue
            if value != first:
                raise DisagreementError(
                    f"ranks disagree on {name}: rank 0 has {first}, rank {rank} has {value}; "
                    "call with the same on all ranks"
                )


def verdict_of_all(comm: Comm, name: str | None) -> Any:
    """The same kept verdict on all ranks, or None on all: of the first that has it, if all ask for the same.

    Ranks of other devices, versions or weights have other names: what one has found is none of the others' business.
    """
    everyone = comm.all_gather_object((name, verdicts.read(name)))
    if name is None or any(other != name for other, _ in everyone):
        return None
    return next((answer for _, answer in everyone if answer is not None), None)
