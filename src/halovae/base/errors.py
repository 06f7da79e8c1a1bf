"""Every error halovae raises, as one tree.

All of them carry one line for each fault: what is wrong, which value, what is allowed, what to do. Functions named
`check_...` raise an `InputError` where they refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class HalovaeError(Exception):
    """Base of all errors that halovae raises on purpose."""


class InputError(HalovaeError, ValueError):
    """A value from the caller can't be used: a file, a flag, a shape, an option."""


class Faults:
    """What is wrong with a request, gathered so that all of it is told at once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, line: str) -> None:
        self._lines[line] = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on after the block when it refuses something."""
        try:
            yield
        except InputError as error:
            self._lines |= dict.fromkeys(str(error).splitlines())

    def check(self) -> None:
        """
        Raises:
            InputError: something was refused; one line of its message for each fault.
        """
        if self._lines:
            raise InputError("\n".join(self._lines))


def counted(count: int, thing: str) -> str:
    """A number of things, as messages say it."""
    return f"{count} {thing}{'s' * (count != 1)}"


class DisagreementError(InputError):
    """Ranks of one group were called with different shapes, dtypes, options or weights."""


class TooLittleMemoryError(InputError):
    """A call would need more memory than is free; nothing was allocated."""


class NotExactError(HalovaeError, NotImplementedError):
    """Exact mode can't run this VAE: an operator mixes positions in a way no rule covers."""


class TilingError(HalovaeError, RuntimeError):
    """The VAE's own tiles can't be used: it has none, or its tiled path gives a wrong picture."""


class VerificationError(HalovaeError, RuntimeError):
    """The probe's sharded result differs from the un-parallel one."""


class RankFailedError(HalovaeError, RuntimeError):
    """Another rank of the group failed during the call.

    Where it failed by another error of halovae's, such as `NotExactError`, this is an instance of that class as well:
    so one `except` clause holds on all ranks, whichever of them was the first to refuse.

    Attributes:
        rank: index in the group of the rank that failed.
        message: what it said.
        details: the failing rank's traceback as text.
        kind: the name of the class of its error, where it was one.
    """

    def __init__(self, rank: int, message: str, details: str = "", kind: str = "") -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank, self.message = rank, message
        self.details, self.kind = details, kind

    def __reduce__(self) -> tuple[Any, ...]:
        return failed_elsewhere, (self.rank, self.message, self.details, self.kind)


_REFUSALS = (InputError, DisagreementError, TooLittleMemoryError, NotExactError, TilingError, VerificationError)
_ELSEWHERE = {kind.__name__: type(RankFailedError.__name__, (RankFailedError, kind), {}) for kind in _REFUSALS}


def failed_elsewhere(rank: int, message: str, details: str = "", kind: str = "") -> RankFailedError:
    """The error to raise where another rank has failed by one of the class that is called `kind`."""
    return _ELSEWHERE.get(kind, RankFailedError)(rank, message, details, kind)
