"""Functions that rearrange positions without moving data between ranks: they move the layout along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named
from halovae.base.geometry import divides
from halovae.exact.layout import (
    Dim,
    Factor,
    Layout,
    axes_in,
    global_length,
    is_sharded,
    layout_of,
    length,
    mark,
    merge_factors,
    permuted,
    plain,
    require_axis,
    require_layout,
    reshaped,
    shape_of,
    split_factor,
)
from halovae.exact.mesh import Mesh
from halovae.exact.rules.attention import remember_runs
from halovae.exact.rules.factories import cut_as, sizes_of
from halovae.exact.shard_mode import maker, rule


@rule(*named("flatten", "squeeze", "unsqueeze", "ravel"))
def regroup(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    viewed = reshaped(layout, _regrouped(func, layout.whole, *_given(args, kwargs)))
    return mark(func(tensor, *args, **kwargs), viewed)


@lru_cache(maxsize=1024)
def _regrouped(func: Any, shape: tuple[int, ...], args: Any, kwargs: Any) -> tuple[int, ...]:
    return tuple(func(_of_shape(shape), *args, **dict(kwargs)).shape)


def _of_shape(shape: tuple[int, ...]) -> Tensor:
    """A tensor to try views on. Not on the meta device, where a prediction would take it for work."""
    return torch.empty((), device="cpu").expand(shape)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments as keys of a cache."""
    return tuple(map(_hashable, args)), tuple((name, _hashable(value)) for name, value in kwargs.items())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


@rule(*named("reshape", "view"))
def reshape(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The sizes are those of the whole: the layout tells what they are on the shard."""
    layout = require_layout(tensor)
    sizes = args or tuple(kwargs.values())
    if isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not all(isinstance(size, int) for size in sizes):
        raise NotExactError("a view as another dtype")
    return _viewed(tensor, layout, sizes)


@rule(*named("unflatten"))
def unflatten(mesh: Mesh, func: Any, tensor: Tensor, dim: int, sizes: Any) -> Any:
    layout = require_layout(tensor)
    dim %= layout.ndim
    return _viewed(tensor, layout, (*layout.whole[:dim], *sizes, *layout.whole[dim + 1 :]))


@rule(*named("reshape_as", "view_as"))
def reshape_as(mesh: Mesh, func: Any, tensor: Tensor, other: Tensor) -> Any:
    layout, wanted = layout_of(tensor), layout_of(other)
    shape = wanted.whole if wanted else shape_of(other)
    return tensor.reshape(shape) if layout is None else _viewed(tensor, layout, shape)


def _viewed(tensor: Tensor, layout: Layout, sizes: Sequence[int]) -> Tensor:
    viewed = _layout_of_view(layout, tuple(sizes))
    # Not as a view: a shard may lie in memory with gaps where the whole does not.
    return mark(tensor.reshape(viewed.shape), viewed)


@lru_cache(maxsize=4096)
def _layout_of_view(layout: Layout, sizes: tuple[int, ...]) -> Layout:
    """The layout of a view by sizes of the whole, one of which may be -1."""
    count, known = prod(layout.whole), prod(size for size in sizes if size != -1)
    rest = count // known if known and -1 in sizes else 1
    if known * rest != count or sizes.count(-1) > 1 or (not known and -1 in sizes):
        raise NotExactError(f"there is no view of {layout.whole} as {tuple(map(int, sizes))}")
    return reshaped(layout, tuple(int(rest if size == -1 else size) for size in sizes))


@rule(*named("permute", "transpose", "movedim", "moveaxis", "swapaxes", "t"), Tensor.mT.__get__, Tensor.T.__get__)  # type: ignore[attr-defined]
def permute(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, *args, **kwargs)
    return mark(result, permuted(layout, _order(func, layout.ndim, *_given(args, kwargs))))


@lru_cache(maxsize=1024)
def _order(func: Any, ndim: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """Where each dimension of the result comes from, as a tensor whose sizes are their own positions tells."""
    return tuple(size - 2 for size in func(_of_shape(tuple(range(2, ndim + 2))), *args, **dict(kwargs)).shape)


@rule(*named("expand", "broadcast_to"))
def expand(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    sizes = args or (kwargs["size"],)
    return _expanded(mesh, tensor, layout, tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes)


@rule(*named("expand_as"))
def expand_as(mesh: Mesh, func: Any, tensor: Tensor, other: Tensor) -> Any:
    layout, wanted = layout_of(tensor), layout_of(other)
    sizes = sizes_of(mesh, wanted) if wanted else shape_of(other)
    return tensor.expand(sizes) if layout is None else _expanded(mesh, tensor, layout, sizes)


def _expanded(mesh: Mesh, tensor: Tensor, layout: Layout, sizes: Sequence[int]) -> Tensor:
    """One position becomes as many as asked for, cut where that is clear from the number."""
    lead = len(sizes) - layout.ndim
    dims: list[Dim] = []
    taken = axes_in(layout.dims)
    for place, size in enumerate(sizes, start=-lead):
        dim = layout.dims[place] if place >= 0 else plain(1)
        if size not in (-1, global_length(dim)):
            if global_length(dim) != 1:
                raise NotExactError(f"it expands {global_length(dim)} positions to {size}")
            dim = cut_as(mesh, [size]).dims[0]
            dim = plain(int(size)) if axes_in([dim]) & taken else dim
            taken |= axes_in([dim])
        dims.append(dim)
    result = Layout(tuple(dims))
    return mark(tensor.expand(result.shape), result)


@rule(*named("repeat", "tile"))
def repeat(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, *args, **kwargs)
    dims: list[Dim] = [plain(size) for size in result.shape[: result.ndim - tensor.ndim]]
    for dim, size in zip(layout.dims, result.shape[len(dims) :], strict=True):
        if is_sharded(dim) and size != length(dim):
            raise NotExactError("a sharded dimension is repeated as a whole")
        dims.append(dim if is_sharded(dim) else plain(size))
    return mark(result, Layout(tuple(dims)))


@maker(*named("repeat_interleave"))
def repeat_interleave(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return remember_runs(func, tensor, args, kwargs)
    repeats = args[0] if args else kwargs["repeats"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(repeats, int) or dim is None:
        raise NotExactError("only a whole number of repeats along one dimension")
    result = func(tensor, *args, **kwargs)
    return mark(result, layout.replace(dim, merge_factors((*layout.dims[dim], Factor(int(repeats))))))


@rule(*named("pixel_shuffle"))
def pixel_shuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, factor)
    if is_sharded(layout.dims[-3]):
        raise NotExactError("the channels are sharded")
    height, width = (merge_factors((*dim, Factor(factor))) for dim in layout.dims[-2:])
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), height, width)))


@rule(*named("pixel_unshuffle"))
def pixel_unshuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = require_layout(tensor)
    if is_sharded(layout.dims[-3]) or any(global_length(dim) % factor for dim in layout.dims[-2:]):
        raise NotExactError("the channels are sharded, or the picture does not divide")
    for dim in (dim for dim in (-2, -1) if is_sharded(layout.dims[dim])):
        if not divides(require_axis(layout, dim).cut, factor):
            raise NotExactError(f"it groups {factor} rows, which does not divide the shards")
    outer = [split_factor(dim[0], global_length(dim) // factor)[:1] for dim in layout.dims[-2:]]
    result = func(tensor, factor)
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), *outer)))


@rule(*named("flip"))
def flip(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    dims = args[0] if args and isinstance(args[0], (list, tuple)) else args or kwargs["dims"]
    if any(is_sharded(layout.dims[dim]) for dim in ([dims] if isinstance(dims, int) else dims)):
        raise NotExactError("it reverses a sharded dimension")
    return mark(func(tensor, *args, **kwargs), layout)
