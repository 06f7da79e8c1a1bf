"""What a network is told about the size of a shard.

Views must be made with the shard's own size, but a decision ("more than 1024 positions? then linear attention") or a
count ("the sum over height * width") must come out the same on every rank, and as it would un-parallel. So sizes of
sharded dimensions are integers of the shard that compare and divide as the whole picture.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from math import prod
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from halovae.exact.layout import Dim, Layout, global_length, is_sharded, layout_of, length
from halovae.exact.registry import Mesh, rule


def whole(value: Any) -> Any:
    """A size as the un-parallel network would see it; anything else as it is."""
    return value.whole if isinstance(value, ShardSize) else value


def _in_shard(operation: Callable[[Any, Any], Any]) -> Callable[[ShardSize, Any], Any]:
    """Arithmetic that stays with whole positions: the shard's and the picture's side by side."""

    def method(self: ShardSize, other: Any) -> Any:
        if not isinstance(other, int):
            return operation(self.whole, other) if isinstance(other, float) else NotImplemented
        return ShardSize(operation(int(self), int(other)), operation(self.whole, whole(other)))

    return method


def _in_picture(operation: Callable[[Any, Any], Any]) -> Callable[[ShardSize, Any], Any]:
    """What decides or measures: the picture's alone, so that it comes out the same on every rank."""

    def method(self: ShardSize, other: Any) -> Any:
        return operation(self.whole, whole(other))

    return method


def _swapped(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: operation(b, a)


class ShardSize(int):
    """A number of positions: the shard's in sums and products, the whole picture's in comparisons and fractions."""

    whole: int

    def __new__(cls, local: int, whole: int) -> ShardSize:
        size = super().__new__(cls, local)
        size.whole = whole
        return size

    __add__ = __radd__ = _in_shard(operator.add)
    __mul__ = __rmul__ = _in_shard(operator.mul)
    __sub__, __rsub__ = _in_shard(operator.sub), _in_shard(_swapped(operator.sub))
    __floordiv__ = _in_shard(operator.floordiv)

    __mod__, __rmod__ = _in_picture(operator.mod), _in_picture(_swapped(operator.mod))
    __truediv__, __rtruediv__ = _in_picture(operator.truediv), _in_picture(_swapped(operator.truediv))
    __pow__, __rpow__ = _in_picture(operator.pow), _in_picture(_swapped(operator.pow))  # type: ignore[assignment]
    __eq__, __ne__ = _in_picture(operator.eq), _in_picture(operator.ne)
    __lt__, __le__ = _in_picture(operator.lt), _in_picture(operator.le)
    __gt__, __ge__ = _in_picture(operator.gt), _in_picture(operator.ge)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __neg__(self) -> ShardSize:
        return ShardSize(-int(self), -self.whole)

    def __float__(self) -> float:
        return float(self.whole)

    def __hash__(self) -> int:
        """No plain number's hash: what is cached for a size must not serve another cut."""
        return hash((ShardSize, int(self), self.whole))


def _size(dim: Dim) -> int:
    return ShardSize(length(dim), global_length(dim)) if is_sharded(dim) else length(dim)


@functools.lru_cache(maxsize=4096)
def _sizes(layout: Layout) -> torch.Size:
    return torch.Size(map(_size, layout.dims))


@rule(Tensor.shape.__get__)  # type: ignore[attr-defined]
def shape(mesh: Mesh, func: Any, tensor: Tensor) -> torch.Size:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor)
    mesh.asked = layout
    return _sizes(layout)


@rule(Tensor.size)
def size(mesh: Mesh, func: Any, tensor: Tensor, dim: SupportsIndex | None = None) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor) if dim is None else func(tensor, dim)
    mesh.asked = layout
    return _sizes(layout) if dim is None else _size(layout.dims[dim])


@rule(Tensor.numel, Tensor.nelement, torch.numel)
def numel(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    layout = layout_of(tensor)
    return func(tensor) if layout is None else prod(map(_size, layout.dims))
