"""What the kernels keep, most of it until a call ends. Each handle has its own, so that threads share nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from halovae.base.geometry import Extent

Making = Callable[[], AbstractContextManager[Callable[[], None]]]
"""Makes what is entered while something is made of a weight; it yields what to call if that is not kept."""


@contextmanager
def ordinarily() -> Iterator[Callable[[], None]]:
    """For who does not care."""
    yield lambda: None


@dataclass
class MadeOfWeight:
    """What was made of one weight, and how to tell that it has changed since."""

    weight: weakref.ref[Tensor]
    place: tuple[Any, ...]
    """Where its memory is, how it lies there, and the number of changes that torch has counted."""
    by_kind: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])


@dataclass
class Kept:
    """What is kept for one handle. One call at a time may use it."""

    weights: dict[int, MadeOfWeight] = field(default_factory=dict[int, MadeOfWeight])
    """By the id of the weight."""
    while_making: Making = ordinarily
    """Entered while something is made of one."""
    room: int = 0
    """Bytes of host memory for what is made of weights."""
    rooms: dict[tuple[str, tuple[int, ...]], tuple[Extent, ...]] = field(
        default_factory=dict[tuple[str, tuple[int, ...]], tuple[Extent, ...]]
    )
    """How much was put around what a kernel made, by its name and the shape: before and after, for each dimension."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the kernels that this thread calls keep here what they keep."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Kept] = ContextVar("_current", default=Kept())  # noqa: B039 (of calls without a handle)


def kept() -> Kept:
    """What is in use in this thread."""
    return _current.get()


@contextmanager
def apart(while_making: Making = ordinarily) -> Iterator[None]:
    """Within it nothing made of weights is there at first, and nothing stays: a prediction leaves no trace.

    Args:
        while_making: entered while something is made of a weight.
    """
    with replace(_current.get(), weights={}, room=0, while_making=while_making).in_use():
        yield
