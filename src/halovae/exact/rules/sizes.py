"""What a network is told about the size of a shard: the size of the whole picture, whatever it does with it.

A network asks for sizes to decide ("more than 1024 positions? then linear attention"), to count, to make views, and to
make tensors. Every answer is a number of the whole picture, so that nothing can come out differently on a shard. Views
are made by the layout, which knows what such a size means for the shard; a tensor made for the whole picture is cut
where it meets shards. A size remembers how it is cut as long as it is clear, so that blanks are no larger than a shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import divides
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    Factor,
    Layout,
    axes_in,
    axis_factor,
    global_length,
    is_sharded,
    layout_of,
    length,
    merge_factors,
    plain,
    split_factor,
)
from halovae.exact.registry import Mesh, rule


class CutSize(int):
    """A number of positions of the whole picture that remembers what it is the product of.

    Attributes:
        factors: how the positions are cut.
        place: of the mesh on which they are cut so.
    """

    factors: tuple[Factor, ...]
    place: object

    @classmethod
    def of(cls, number: int, factors: tuple[Factor, ...], place: object) -> CutSize:
        size = cls(number)
        size.factors, size.place = factors, place
        return size

    # Sizes are multiplied a lot and seldom asked for more than the number, so nothing is simplified here.

    def __mul__(self, other: Any) -> Any:
        product = super().__mul__(other)
        return CutSize.of(product, (*self.factors, *_factors(other)), self.place) if isinstance(other, int) else product

    def __rmul__(self, other: Any) -> Any:
        product = super().__rmul__(other)
        return CutSize.of(product, (*_factors(other), *self.factors), self.place) if isinstance(other, int) else product

    def __floordiv__(self, other: Any) -> Any:
        result, factor = super().__floordiv__(other), axis_factor(merge_factors(self.factors))
        if factor is None or not isinstance(other, int) or not other or not divides(factor.cut, int(other)):
            return result
        return CutSize.of(result, split_factor(factor, result)[:1], self.place)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _factors(number: int) -> tuple[Factor, ...]:
    return number.factors if isinstance(number, CutSize) else plain(int(number))


def cut_as(mesh: Mesh, sizes: Iterable[Any]) -> Layout:
    """The layout of a tensor of these sizes: cut where it is clear from them, else whole.

    A second dimension of one axis is whole: of the scores of all queries and all keys, a rank has those of its queries.
    """
    dims: list[Dim] = []
    for size in sizes:
        factors = size.factors if isinstance(size, CutSize) and size.place is mesh.place else ()
        axes = [factor.axis for factor in factors if isinstance(factor, AxisFactor)]
        is_clear = axes and len(set(axes)) == len(axes) and axes_in(dims).isdisjoint(axes)
        dims.append(merge_factors(factors) if is_clear else plain(int(size)))
    return Layout(tuple(dims))


def sizes_of(mesh: Mesh, layout: Layout) -> torch.Size:
    """The whole shape."""
    known = mesh.sizes.get(layout)
    if known is None:
        sizes = (
            CutSize.of(global_length(dim), dim, mesh.place) if is_sharded(dim) else length(dim) for dim in layout.dims
        )
        known = mesh.sizes[layout] = torch.Size(sizes)
    return known


@rule(getattr(Tensor, "shape").__get__)  # noqa: B009
def shape(mesh: Mesh, func: Any, tensor: Tensor) -> torch.Size:
    layout = layout_of(tensor)
    return func(tensor) if layout is None else sizes_of(mesh, layout)


@rule(Tensor.size)
def size(mesh: Mesh, func: Any, tensor: Tensor, dim: SupportsIndex | None = None) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor) if dim is None else func(tensor, dim)
    return sizes_of(mesh, layout) if dim is None else sizes_of(mesh, layout)[dim]


@rule(Tensor.__len__)
def rows(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    layout = layout_of(tensor)
    return func(tensor) if layout is None or not layout.dims else int(layout.whole[0])


@rule(Tensor.numel, Tensor.nelement, torch.numel)
def numel(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    layout = layout_of(tensor)
    return func(tensor) if layout is None else prod(layout.whole)


@rule(getattr(Tensor, "nbytes").__get__)  # noqa: B009
def nbytes(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    layout = layout_of(tensor)
    return func(tensor) if layout is None else prod(layout.whole) * tensor.element_size()


@rule(Tensor.stride)
def stride(mesh: Mesh, func: Any, tensor: Tensor, dim: int | None = None) -> Any:
    """Of the whole, which lies in memory as its shards do where these have no gaps."""
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor) if dim is None else func(tensor, dim)
    own, strides = tensor.stride(), [0] * tensor.ndim
    here = there = 1
    for d in sorted(range(tensor.ndim - 1, -1, -1), key=lambda d: own[d]):
        if own[d] != here and layout.shape[d] > 1:
            raise NotExactError("it is part of a larger tensor or repeats itself, so the whole's strides are not known")
        strides[d] = there
        here, there = here * max(1, layout.shape[d]), there * max(1, layout.whole[d])
    return tuple(strides) if dim is None else strides[dim]


ABOUT_SIZES = {
    getattr(Tensor, "shape").__get__, Tensor.size, Tensor.__len__, Tensor.numel, Tensor.nelement, torch.numel,  # noqa: B009
    getattr(Tensor, "nbytes").__get__, Tensor.stride,  # noqa: B009
}  # fmt: skip
"""The questions that are answered here."""
