"""Kernels on shapes alone: a prediction runs them on tensors of the meta device, which stand for those of a real one.

There are no values then. Weights are shapes too, and of equal pieces of work one stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from halovae.base.private_torch import without_modes

Piece = TypeVar("Piece")


class DeviceStandIn:
    """What tensors of the meta device stand for.

    Attributes:
        turns: how many equal pieces of work the present one stands for.
    """

    def __init__(self, device: torch.device) -> None:
        self.type = device.type
        self.turns = 1
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def weight(self, weight: Tensor) -> Tensor:
        """The shape of a weight, the same one each time, so that what is made of it can be kept."""
        if id(weight) not in self._weights:
            with without_modes():  # it is there already, and takes nothing
                shape = torch.empty_like(weight, device="meta")
            self._weights[id(weight)] = weight, shape  # The weight is kept, so that its id stays its own.
        return self._weights[id(weight)][1]

    def forget(self) -> None:
        """Let go of the weights, and so of what was made of them."""
        self._weights.clear()

    def one_of_each(self, pieces: Iterable[Piece], size: Callable[[Piece], Hashable]) -> Iterator[Piece]:
        """The first piece of each size, during which `turns` tells how many there are."""
        alike: dict[Hashable, list[Piece]] = {}
        for piece in pieces:
            alike.setdefault(size(piece), []).append(piece)
        for first, *others in alike.values():
            self.turns *= 1 + len(others)
            try:
                yield first
            finally:
                self.turns //= 1 + len(others)


_current: ContextVar[DeviceStandIn | None] = ContextVar("_current", default=None)


@contextmanager
def standing_in(device: torch.device) -> Iterator[DeviceStandIn]:
    """Within it, tensors of the meta device stand for those of `device`."""
    stand_in = DeviceStandIn(device)
    token = _current.set(stand_in)
    try:
        yield stand_in
    finally:
        _current.reset(token)
        stand_in.forget()


def device_type(device: torch.device) -> str:
    """The type of a device, or of the one that it stands for."""
    stand_in = _current.get() if device.type == "meta" else None
    return stand_in.type if stand_in else device.type


def alike(weight: Tensor, picture: Tensor) -> Tensor:
    """The weight to use with a picture: its shape where the picture is one."""
    stand_in = _current.get() if picture.is_meta and not weight.is_meta else None
    return stand_in.weight(weight) if stand_in else weight


def in_turn(pieces: Iterable[Piece], picture: Tensor, size: Callable[[Piece], Hashable]) -> Iterable[Piece]:
    """The pieces of a picture that are to be worked on; where it is a shape, one of each size."""
    stand_in = _current.get() if picture.is_meta else None
    return stand_in.one_of_each(pieces, size) if stand_in else pieces
