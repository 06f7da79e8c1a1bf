"""What a network is told about sizes, and the tensors that it makes of them: all are of the whole picture.

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
from halovae.base.functions import named
from halovae.base.geometry import divides
from halovae.comm import default_generator
from halovae.exact.halo import own_part
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
    mark,
    merge_factors,
    plain,
    require_layout,
    split_factor,
)
from halovae.exact.mesh import Mesh
from halovae.exact.rules.attention import prefix_mask
from halovae.exact.shard_mode import maker, rule


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


_SHAPE, _NBYTES = (getattr(Tensor, name).__get__ for name in ("shape", "nbytes"))


@rule(_SHAPE, Tensor.size)
def size(mesh: Mesh, func: Any, tensor: Tensor, dim: SupportsIndex | None = None) -> Any:
    sizes = sizes_of(mesh, require_layout(tensor))
    return sizes if dim is None else sizes[dim]


@rule(Tensor.__len__, Tensor.numel, Tensor.nelement, torch.numel, _NBYTES)
def count(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    """Rows, elements or bytes."""
    whole = require_layout(tensor).whole
    if func is Tensor.__len__:
        return int(whole[0])
    return prod(whole) * (tensor.element_size() if func == _NBYTES else 1)


@rule(Tensor.stride)
def stride(mesh: Mesh, func: Any, tensor: Tensor, dim: int | None = None) -> Any:
    """Of the whole, which lies in memory as its shards do where these have no gaps."""
    layout = require_layout(tensor)
    own, strides = tensor.stride(), [0] * tensor.ndim
    here = there = 1
    for d in sorted(range(tensor.ndim - 1, -1, -1), key=lambda d: own[d]):
        if own[d] != here and layout.shape[d] > 1:
            raise NotExactError("it is part of a larger tensor or repeats itself, so the whole's strides are not known")
        strides[d] = there
        here, there = here * max(1, layout.shape[d]), there * max(1, layout.whole[d])
    return tuple(strides) if dim is None else strides[dim]


# ---- blanks of a shard's size, random numbers cut to it -------------------------------------------------------------


@maker(torch.zeros, torch.ones, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty)
def constant(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    before = [arg for arg in args[:1] if isinstance(arg, Tensor)]
    size = args[len(before) :] or (kwargs.pop("size"),)
    return _made(mesh, func, tuple(before), size, (), kwargs)


@maker(Tensor.new_full)
def new_full(mesh: Mesh, func: Any, tensor: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    return _made(mesh, func, (tensor,), (size,), (fill_value,), kwargs)


@maker(torch.full)
def full(mesh: Mesh, func: Any, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    if len(size) == 2 and isinstance(size[0], CutSize) and size[0] == size[1] and fill_value == float("-inf"):
        return prefix_mask(size[0], kwargs.get("dtype"), kwargs.get("device"))
    return _made(mesh, func, (), (size,), (fill_value,), kwargs)


def _made(
    mesh: Mesh, func: Any, before: tuple[Any, ...], size: tuple[Any, ...], behind: tuple[Any, ...], kwargs: Any
) -> Tensor:  # fmt: skip
    """A blank of the given size, which is that of the whole, cut where that is clear from the size."""
    size = tuple(size[0]) if isinstance(size[0], (tuple, list)) else size
    layout = cut_as(mesh, size)
    return mark(func(*before, layout.shape, *behind, **kwargs), layout)


@rule(torch.tensor, torch.as_tensor)
def from_numbers(mesh: Mesh, func: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotExactError("it copies a shard into an ordinary tensor")


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def constant_like(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return mark(func(tensor, *args, **kwargs), require_layout(tensor))


@maker(torch.randn, torch.rand)
def random(mesh: Mesh, func: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise for a shard is cut out of noise drawn for the whole picture, from the first rank's generator."""
    sizes = tuple(size[0] if size and not isinstance(size[0], int) else size or kwargs.pop("size"))
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    layout = cut_as(mesh, sizes)
    noise = func(layout.whole, **kwargs)
    for dim in layout.sharded_dims:
        noise = own_part(mesh, noise, dim, layout.dims[dim])
    return mark(noise.contiguous(), layout)


def _share(mesh: Mesh, generator: torch.Generator, device: torch.device) -> None:
    """Bring every rank's generator to the state of the first one's."""
    if device.type == "meta":
        return  # on shapes alone there are no numbers
    state = generator.get_state().to(device)
    others = [rank for rank in range(mesh.size) if rank != mesh.comm.rank]
    if mesh.comm.rank == 0:
        mesh.comm.exchange([(rank, state) for rank in others], [])
    else:
        mesh.comm.exchange([], [(0, state)])
        generator.set_state(state.cpu())


@maker(*named("randn_like", "rand_like", "randint_like", "bernoulli", "normal", "uniform", "exponential", "random",
             "randint", "randperm", "multinomial"))  # fmt: skip
def unshaped_random(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if any(layout_of(tensor) for tensor in tensors):
        raise NotExactError("random numbers are drawn for a shard alone")
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    return func(*args, **kwargs)
