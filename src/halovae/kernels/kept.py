"""What the kernels keep, most of it until a call ends. Each handle has its own, so that threads share nothing.

What is made of weights is made once in a call and used many times: converted, summed or packed for what convolves. A
weight may change between any two calls, in all elements or in one, so nothing of it is kept beyond a call: to make it
anew takes a small part of a call. Within a call, changes that torch counts are seen. On a CPU nothing is kept: beside
its convolutions, what is made of weights takes no time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from halovae.base.functions import outside_modes
from halovae.base.geometry import Extent
from halovae.base.private_torch import changes
from halovae.kernels.shapes_only import device_type


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
def apart() -> Iterator[None]:
    """Within it nothing made of weights is there at first, and nothing stays: a prediction leaves no trace."""
    with replace(_current.get(), weights={}).in_use():
        yield


def derived(weight: Tensor, kind: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before for the same weight and kind. On a CPU it is made anew each time."""
    if device_type(weight.device) == "cpu":
        return make()
    weights, key, place = kept().weights, id(weight), _place(weight)
    before = weights.get(key)
    if before is None or before.weight() is not weight or before.place != place:
        weights.pop(key, None)
        before = MadeOfWeight(weakref.ref(weight, lambda _: weights.pop(key, None)), place)
    elif kind in before.by_kind:
        return before.by_kind[kind]
    made = make()
    if made is not weight:
        weights.setdefault(key, before).by_kind[kind] = made
    return made


@outside_modes
def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, changes(weight)


def end_call() -> None:
    """From here on weights may be others than before."""
    kept().weights.clear()
