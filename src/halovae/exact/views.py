"""Functions that rearrange positions without moving data between ranks: they move the layout along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from halovae.errors import NotExactError
from halovae.exact.layout import (
    Dim,
    Factor,
    Layout,
    global_length,
    is_sharded,
    keep_uniform,
    layout_of,
    length,
    mark,
    merge_factors,
    permuted,
    plain,
    require_axis,
    reshaped,
    shape_of,
    split_factor,
)
from halovae.exact.masks import remember_runs
from halovae.exact.registry import Mesh, named, rule
from halovae.exact.sizes import whole
from halovae.geometry import divides


@rule(*named("flatten", "squeeze", "unsqueeze", "ravel"))
def regroup(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    return keep_uniform(result, tensor) if layout is None else mark(result, reshaped(layout, shape_of(result)))


@rule(*named("reshape", "view"))
def reshape(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sizes that the network writes down must be those of the picture, so that no constant cuts through a shard."""
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(func(tensor, *args, **kwargs), tensor)
    sizes = args or tuple(kwargs.values())
    if isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not all(isinstance(size, int) for size in sizes):
        raise NotExactError("a view as another dtype")
    result = _viewed(Tensor.reshape, tensor, sizes)  # a shard may lie in memory with gaps where the whole does not
    return mark(result, _checked(reshaped(layout, shape_of(result)), 0, sizes))


@rule(*named("unflatten"))
def unflatten(mesh: Mesh, func: Any, tensor: Tensor, dim: int, sizes: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(func(tensor, dim, sizes), tensor)
    result = _viewed(func, tensor, dim, sizes)
    return mark(result, _checked(reshaped(layout, tuple(result.shape)), dim % tensor.ndim, sizes))


def _viewed(func: Any, tensor: Tensor, *args: Any) -> Tensor:
    try:
        return func(tensor, *args)
    except RuntimeError as error:
        raise NotExactError(f"the picture may be viewed so, its shard {tuple(tensor.shape)} not: {error}") from None


def _checked(layout: Layout, first: int, sizes: Sequence[int]) -> Layout:
    """The layout of a view, whose dimensions from `first` on were given these sizes."""
    for size, dim in zip(sizes, layout.dims[first:], strict=False):
        if size != -1 and whole(size) != global_length(dim):
            raise NotExactError(f"a view asks for {whole(size)} positions where the picture has {global_length(dim)}")
    return layout


@rule(*named("reshape_as", "view_as"))
def reshape_as(mesh: Mesh, func: Any, tensor: Tensor, other: Tensor) -> Any:
    layout, wanted = layout_of(tensor), layout_of(other)
    result = func(tensor, other)
    if layout is None:
        return keep_uniform(result, tensor)
    after = reshaped(layout, tuple(result.shape))
    if wanted is None or after.dims != wanted.dims:
        raise NotExactError("a view as a tensor that is cut differently")
    return mark(result, after)


@rule(*named("permute", "transpose", "movedim", "moveaxis", "swapaxes", "t"), Tensor.mT.__get__, Tensor.T.__get__)  # type: ignore[attr-defined]
def permute(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(result, tensor)
    given = tuple(map(_hashable, args)), tuple((name, _hashable(value)) for name, value in kwargs.items())
    return mark(result, permuted(layout, _order(func, layout.ndim, *given)))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


@lru_cache(maxsize=1024)
def _order(func: Any, ndim: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """Where each dimension of the result comes from, as a tensor whose sizes are their own positions tells."""
    # Not on the meta device, where a prediction would take it for work. It has one element in memory.
    probe = func(torch.empty((), device="cpu").expand(tuple(range(2, ndim + 2))), *args, **dict(kwargs))
    return tuple(size - 2 for size in probe.shape)


@rule(*named("expand", "expand_as", "broadcast_to"))
def expand(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(result, tensor)
    lead = tuple(plain(size) for size in result.shape[: result.ndim - tensor.ndim])
    dims = zip(layout.dims, result.shape[len(lead) :], strict=True)
    return mark(result, Layout((*lead, *(dim if is_sharded(dim) else plain(size) for dim, size in dims))))


@rule(*named("repeat", "tile"))
def repeat(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(result, tensor)
    dims: list[Dim] = [plain(size) for size in result.shape[: result.ndim - tensor.ndim]]
    for dim, size in zip(layout.dims, result.shape[len(dims) :], strict=True):
        if is_sharded(dim) and size != length(dim):
            raise NotExactError("a sharded dimension is repeated as a whole")
        dims.append(dim if is_sharded(dim) else plain(size))
    return mark(result, Layout(tuple(dims)))


@rule(*named("repeat_interleave"))
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
    result = func(tensor, factor)
    layout = layout_of(tensor)
    if layout is None:
        return result
    if is_sharded(layout.dims[-3]):
        raise NotExactError("the channels are sharded")
    height, width = (merge_factors((*dim, Factor(factor))) for dim in layout.dims[-2:])
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), height, width)))


@rule(*named("pixel_unshuffle"))
def pixel_unshuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor, factor)
    if is_sharded(layout.dims[-3]) or any(global_length(dim) % factor for dim in layout.dims[-2:]):
        raise NotExactError("the channels are sharded, or the picture does not divide")
    for dim in (dim for dim in (-2, -1) if is_sharded(layout.dims[dim])):
        if not divides(require_axis(layout, dim).cut, factor):
            raise NotExactError(f"it groups {factor} rows, which does not divide the shards")
    outer = [split_factor(dim[0], length(dim) // factor)[:1] for dim in layout.dims[-2:]]
    result = func(tensor, factor)
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), *outer)))


@rule(*named("flip"))
def flip(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor, *args, **kwargs)
    dims = args[0] if args and isinstance(args[0], (list, tuple)) else args or kwargs["dims"]
    if any(is_sharded(layout.dims[dim]) for dim in ([dims] if isinstance(dims, int) else dims)):
        raise NotExactError("it reverses a sharded dimension")
    return mark(func(tensor, *args, **kwargs), layout)
