"""What is made of weights once and used many times: converted, summed or packed for the library that convolves.

A weight may change between any two calls, in all elements or in one. Changes that torch counts are seen at each use;
others (by way of `.data` or numpy, or of inference tensors) at the first use in a call. In host memory the values are
compared by sums, which takes a small part of the time of packing. On an accelerator nothing is kept beyond a call: to
make it anew takes no longer than to look at the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from halovae.base.functions import outside_modes
from halovae.base.private_torch import changes
from halovae.kernels.kept import MadeOfWeight, kept
from halovae.kernels.shapes_only import device_type


def derived(weight: Tensor, kind: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before for the same weight and kind. In host memory it is kept if there is room."""
    before = _made_of(weight)
    if before and kind in before.by_kind:
        return before.by_kind[kind]
    with kept().while_making() as dropped:
        made = make()
        if made is not weight and (device_type(made.device) != "cpu" or _has_room(made.nbytes)):
            (before or _begun(weight)).by_kind[kind] = made
        else:
            dropped()
    return made


def keeps(weight: Tensor, kind: Hashable, size: int) -> bool:
    """Whether `derived` has kept what was made of a weight in host memory, or would keep it: so many bytes."""
    made = _made_of(weight)
    return (made is not None and kind in made.by_kind) or _has_room(size)


def _made_of(weight: Tensor) -> MadeOfWeight | None:
    """What was made of a weight as it is now."""
    store, key = kept(), id(weight)
    made = store.weights.get(key)
    if made is None or made.weight() is not weight:
        return None
    if made.place == _place(weight):
        if made.call == store.call:
            return made
        if made.digest and all(map(torch.equal, made.digest, _digest(weight))):
            made.call = store.call
            return made
    store.weights.pop(key, None)
    return None


def _begun(weight: Tensor) -> MadeOfWeight:
    store, key = kept(), id(weight)
    weights = store.weights
    made = MadeOfWeight(
        weakref.ref(weight, lambda _: weights.pop(key, None)), _place(weight), _digest(weight), store.call
    )
    weights[key] = made
    return made


@outside_modes
def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, changes(weight)


@outside_modes
def _digest(weight: Tensor) -> tuple[Tensor, ...]:
    """Sums of the bits along each side of the weight as a matrix; of weights in host memory."""
    if weight.device.type != "cpu":
        return ()
    order = sorted(range(weight.ndim), key=lambda dim: -weight.stride(dim))
    # A weight that is cut out of another one has gaps.
    lines = weight.detach().permute(order).reshape(len(weight) if weight.ndim else 1, -1).contiguous()
    size = lines.shape[1] * lines.element_size()
    # The widest integers that fill a line: they are added up at the speed of the memory.
    bits = lines.view(next(whole for whole in _INTEGERS if size % whole.itemsize == 0))
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def _has_room(size: int) -> bool:
    return kept_bytes() + size <= kept().room


def make_room(picture_bytes: int) -> None:
    """Let what is kept of all weights take as much host memory as a picture of this size, or as the largest so far.

    Beside large weights and small pictures, copies of weights would be most of the memory that a call takes.
    """
    store = kept()
    store.room = max(store.room, picture_bytes)


def kept_bytes() -> int:
    """The host memory that is taken by what is kept."""
    # Lists, since a weight that is collected meanwhile takes an entry away.
    made = [tensor for entry in list(kept().weights.values()) for tensor in list(entry.by_kind.values())]
    return sum(tensor.nbytes for tensor in made if device_type(tensor.device) == "cpu")


def begin_call() -> None:
    """From here on weights may be others than before."""
    kept().call += 1


def end_call() -> None:
    """Free what was made of weights on accelerators."""
    weights = kept().weights
    for key, made in list(weights.items()):
        if not made.digest:
            weights.pop(key, None)


def forget() -> None:
    """Free everything, and begin anew with the room for it."""
    store = kept()
    store.weights.clear()
    store.room = 0
