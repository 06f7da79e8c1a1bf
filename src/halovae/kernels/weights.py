"""What is made of weights once and used many times: converted, summed or packed for the library that convolves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halovae.kernels.shapes import device_type

_SAMPLES = 64


@dataclass
class _Entry:
    """What was made of one weight, and how to tell that it has changed since."""

    weight: weakref.ref[Tensor]
    address: int
    sample: Tensor
    made: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])

    def holds_for(self, weight: Tensor) -> bool:
        return (
            self.weight() is weight
            and self.address == weight.data_ptr()
            and (
                # Reading from an accelerator waits for it; `forget_changed` does that once for a call.
                weight.device.type != "cpu" or torch.equal(self.sample, _sample(weight))
            )
        )


_entries: dict[int, _Entry] = {}
_room = 0


def derived(weight: Tensor, kind: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before for the same weight and kind. In host memory it is kept if there is room.

    A weight has changed when its memory moved or when 64 elements spread over it differ, which any dense update does.
    """
    entry = _entries.get(id(weight))
    if entry is None or not entry.holds_for(weight):
        key = id(weight)
        entry = _Entry(weakref.ref(weight, lambda _: _entries.pop(key, None)), weight.data_ptr(), _sample(weight))
        _entries[key] = entry
    made = entry.made.get(kind)
    if made is None:
        made = make()
        if made is not weight and (device_type(made.device) != "cpu" or _has_room(made.nbytes)):
            entry.made[kind] = made
    return made


def keeps(weight: Tensor, kind: Hashable, size: int) -> bool:
    """Whether `derived` has kept what was made of a weight in host memory, or would keep it: so many bytes."""
    entry = _entries.get(id(weight))
    return (entry is not None and entry.weight() is weight and kind in entry.made) or _has_room(size)


def _has_room(size: int) -> bool:
    return kept_bytes() + size <= _room


def make_room(picture_bytes: int) -> None:
    """Let what is kept of all weights take as much host memory as a picture of this size, or as the largest so far.

    Beside large weights and small pictures, copies of weights would be most of the memory that a call takes.
    """
    global _room
    _room = max(_room, picture_bytes)


@contextmanager
def apart() -> Iterator[None]:
    """Within it nothing is kept at first, and afterwards what was kept before: a prediction leaves no trace."""
    global _entries, _room
    before = _entries, _room
    _entries, _room = {}, 0
    try:
        yield
    finally:
        _entries, _room = before


def kept_bytes() -> int:
    """The host memory that is taken by what is kept."""
    # Lists, since a weight that is collected meanwhile, or another thread, takes an entry away.
    made = [tensor for entry in list(_entries.values()) for tensor in list(entry.made.values())]
    return sum(tensor.nbytes for tensor in made if device_type(tensor.device) == "cpu")


def forget_changed() -> None:
    """Free what was made of weights on accelerators that have changed since."""
    differ: dict[torch.device, dict[int, Tensor]] = {}
    for key, entry in list(_entries.items()):
        weight = entry.weight()
        # One whose memory has moved is found out by `holds_for`; it may have another shape as well.
        if weight is not None and weight.device.type != "cpu" and weight.data_ptr() == entry.address:
            differ.setdefault(weight.device, {})[key] = (entry.sample != _sample(weight)).any()
    for flags in differ.values():  # One wait for each device, not one for each weight.
        for key, changed in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True):
            if changed:
                _entries.pop(key, None)


def forget() -> None:
    """Free everything, and begin anew with the room for it."""
    global _room
    _entries.clear()
    _room = 0


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()
