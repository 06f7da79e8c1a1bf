"""Functions that rearrange positions without moving data between ranks: they move the layout along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halovae.errors import NotExactError
from halovae.exact.layout import (
    Dim,
    Factor,
    Layout,
    is_sharded,
    keep_uniform,
    layout_of,
    length,
    mark,
    mark_transposed,
    merge_factors,
    permuted,
    plain,
    reshaped,
    split_factor,
)
from halovae.exact.masks import remember_runs
from halovae.exact.registry import Mesh, named, rule


@rule(*named("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as", "squeeze", "unsqueeze", "ravel"))
def reshape(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    if layout is None:
        return keep_uniform(result, tensor)
    if result.dtype != tensor.dtype:
        raise NotExactError("a view as another dtype")
    return mark(result, reshaped(layout, tuple(result.shape)))


@rule(*named("permute", "transpose", "movedim", "moveaxis", "swapaxes", "t"), Tensor.mT.__get__, Tensor.T.__get__)  # type: ignore[attr-defined]
def permute(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    layout = layout_of(tensor)
    if layout is None:
        return result
    # A tensor whose sizes are their own positions tells where each dimension went.
    probe = func(torch.empty(tuple(range(2, tensor.ndim + 2)), device="meta"), *args, **kwargs)
    order = [size - 2 for size in probe.shape]
    if order[-2:] == [tensor.ndim - 1, tensor.ndim - 2]:
        mark_transposed(result)
    return mark(result, permuted(layout, order))


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
    height, width = (merge_factors((*dim, Factor(factor))) for dim in layout.dims[-2:])
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), height, width)))


@rule(*named("pixel_unshuffle"))
def pixel_unshuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor, factor)
    outer = [tuple(split_factor(f, f.size // factor)[:1]) for dim in layout.dims[-2:] for f in dim]
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
