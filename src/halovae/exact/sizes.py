"""What a network is told about the size of a shard.

Views must be made with the shard's own size, but a decision ("more than 1024 positions? then linear attention") must
come out the same on every rank, and as it would un-parallel. So sizes of sharded dimensions are integers of the shard
that compare as the whole picture.
"""

from __future__ import annotations

from math import prod
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from halovae.exact.layout import AxisFactor, Dim, Layout, global_length, is_sharded, layout_of, length
from halovae.exact.registry import Mesh, rule


class ShardSize(int):
    """A number of positions: the shard's in arithmetic, the whole picture's in `<`, `<=`, `>` and `>=`."""

    whole: int

    def __new__(cls, local: int, whole: int) -> ShardSize:
        size = super().__new__(cls, local)
        size.whole = whole
        return size

    def __mul__(self, other: int) -> int:
        if not isinstance(other, int):
            return NotImplemented
        return ShardSize(int(self) * int(other), self.whole * _whole(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        if not isinstance(other, int):
            return NotImplemented
        return ShardSize(int(self) // int(other), self.whole // _whole(other))

    def __add__(self, other: int) -> int:
        if not isinstance(other, int):
            return NotImplemented
        return ShardSize(int(self) + int(other), self.whole + _whole(other))

    __radd__ = __add__

    def __sub__(self, other: int) -> int:
        if not isinstance(other, int):
            return NotImplemented
        return ShardSize(int(self) - int(other), self.whole - _whole(other))

    def __lt__(self, other: Any) -> bool:
        return self.whole < _whole(other)

    def __le__(self, other: Any) -> bool:
        return self.whole <= _whole(other)

    def __gt__(self, other: Any) -> bool:
        return self.whole > _whole(other)

    def __ge__(self, other: Any) -> bool:
        return self.whole >= _whole(other)


def _whole(value: Any) -> Any:
    return value.whole if isinstance(value, ShardSize) else value


def _size(dim: Dim) -> int:
    return ShardSize(length(dim), global_length(dim)) if is_sharded(dim) else length(dim)


@rule(Tensor.shape.__get__)  # type: ignore[attr-defined]
def shape(mesh: Mesh, func: Any, tensor: Tensor) -> torch.Size:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor)
    mesh.asked = layout
    return torch.Size(map(_size, layout.dims))


@rule(Tensor.size)
def size(mesh: Mesh, func: Any, tensor: Tensor, dim: SupportsIndex | None = None) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor) if dim is None else func(tensor, dim)
    mesh.asked = layout
    return torch.Size(map(_size, layout.dims)) if dim is None else _size(layout.dims[dim])


@rule(Tensor.numel, Tensor.nelement, torch.numel)
def numel(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    """Elements of the largest shard: networks ask in order to bound their memory, and must decide alike."""
    layout = layout_of(tensor)
    return func(tensor) if layout is None else _largest(layout)


def _largest(layout: Layout) -> int:
    factors = [factor for dim in layout.dims for factor in dim]
    return prod(max(map(f.cut.present, range(f.cut.parts))) if isinstance(f, AxisFactor) else f.size for f in factors)
