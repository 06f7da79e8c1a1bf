"""Normalisations and reductions. Those over channels are local; over a sharded dimension, statistics, sums and means
are completed over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named
from halovae.comm import all_gather
from halovae.exact.halo import own
from halovae.exact.layout import (
    Layout,
    axes_in,
    global_length,
    is_sharded,
    length,
    mark,
    plain,
    require_layout,
)
from halovae.exact.mesh import Mesh
from halovae.exact.shard_mode import rule
from halovae.kernels import group_norm as norms


@rule(F.group_norm)
def group_norm(
    mesh: Mesh,
    func: Any,
    tensor: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`[N, C, ...]`, normalised over each group of channels and all positions behind.

    Count, mean and sum of squared deviations of the shards are merged exactly, in float32 or better.
    """
    layout = require_layout(tensor, weight, bias)
    axes = axes_in(layout.dims[1:])
    if not axes or 0 in layout.shape:
        return mark(func(tensor, num_groups, weight, bias, eps), layout)
    if is_sharded(layout.dims[1]):
        raise NotExactError("the channels of a group norm are sharded")
    tensor, layout = own(mesh, tensor, layout)
    # The count too is gathered, of what each shard has: together it is the whole picture's.
    found = all_gather(mesh.comm, norms.moments(tensor, num_groups), mesh.ranks_along(axes))
    return mark(norms.normalized(tensor, found, weight, bias, eps), layout)


@rule(F.layer_norm, F.rms_norm)
def over_last_dims(
    mesh: Mesh, func: Any, tensor: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    layout = require_layout(tensor, *args, *kwargs.values())
    if any(is_sharded(dim) for dim in layout.dims[-len(normalized_shape) :]):
        raise NotExactError("it normalises over a sharded dimension")
    return mark(func(tensor, normalized_shape, *args, **kwargs), layout)


@rule(F.batch_norm)
def batch_norm(mesh: Mesh, func: Any, tensor: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor, mean, var, *args, *kwargs.values())
    training = kwargs.get("training", args[2] if len(args) > 2 else False)
    if training or is_sharded(layout.dims[1]):
        raise NotExactError("batch statistics are in use: call vae.eval() first")
    return mark(func(tensor, mean, var, *args, **kwargs), layout)


@rule(F.instance_norm)
def instance_norm(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor, *args, *kwargs.values())
    if any(is_sharded(dim) and length(dim) for dim in layout.dims[2:]):
        raise NotExactError("it normalises over sharded dimensions")
    return mark(func(tensor, *args, **kwargs), layout)


# ---- reductions -----------------------------------------------------------------------------------------------------


def sum_over_ranks(mesh: Mesh, partial: Tensor, axes: set[int]) -> Tensor:
    """The sum of every rank's partial sums, added in the same order on all ranks."""
    return torch.stack(all_gather(mesh.comm, partial, mesh.ranks_along(axes))).sum(0)


@rule(*named("sum", "mean"))
def sum_or_mean(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout = require_layout(tensor)
    dims, keepdim, dtype = _asked(tensor.ndim, *args, **kwargs)
    if not any(is_sharded(layout.dims[d]) for d in dims):
        return mark(func(tensor, dims, keepdim, dtype=dtype), _reduced(layout, dims, keepdim))
    tensor, layout = own(mesh, tensor, layout)
    axes = axes_in(layout.dims[d] for d in dims)
    total = sum_over_ranks(mesh, torch.sum(tensor, dims, keepdim, dtype=dtype or _wide(tensor.dtype)), axes)
    if getattr(func, "__name__", "") == "mean":
        total = total / prod(global_length(layout.dims[d]) for d in dims)
    if dtype is None and tensor.is_floating_point():
        total = total.to(tensor.dtype)
    return mark(total, _reduced(layout, dims, keepdim))


def _asked(
    ndim: int, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: torch.dtype | None = None
) -> tuple[list[int], bool, torch.dtype | None]:
    """Dimensions, keepdim and dtype, however the caller spelled them."""
    return _dims(axis if dim is None else dim, ndim), keepdim, dtype


@rule(*named("amax", "amin", "argmax", "argmin", "cumsum", "std", "var", "any", "all",
             "prod", "max", "min", "median", "sort", "argsort"))  # fmt: skip
def along_dim(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Functions along dimensions that no other rank has part of; the result has those dimensions shortened or gone."""
    return _along(func, tensor, args[0] if args else None, args, kwargs)


@rule(*named("topk", "norm"), torch.linalg.vector_norm, torch.linalg.norm)
def along_second(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The same where the dimension comes second, behind an order or a count."""
    return _along(func, tensor, args[1] if len(args) > 1 else None, args, kwargs)


def _along(func: Any, tensor: Tensor, dim: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout = require_layout(tensor)
    dim = kwargs.get("dim", kwargs.get("axis", dim))
    dims = _dims(None if isinstance(dim, (bool, Tensor)) else dim, tensor.ndim)
    if any(isinstance(a, Tensor) for a in args) or any(is_sharded(layout.dims[d]) for d in dims):
        raise NotExactError("it compares or scans positions of several shards")
    result = func(tensor, *args, **kwargs)
    for part in [result] if isinstance(result, Tensor) else result:
        same_rank = part.ndim == tensor.ndim
        known = layout
        for d in dims:
            known = known.replace(d, plain(part.shape[d] if same_rank else 1))
        mark(part, known if same_rank else _reduced(known, dims, False))
    return result


@rule(*named("softmax", "log_softmax"))
def softmax(mesh: Mesh, func: Any, tensor: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Over a sharded dimension, largest values and sums are completed over the ranks, in float32 or better."""
    layout = require_layout(tensor)
    if dim is None:
        dim = 0 if tensor.ndim in (0, 1, 3) else 1  # torch's old choice
    if not is_sharded(layout.dims[dim]):
        return mark(func(tensor, dim, *args, **kwargs), layout)
    wanted = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), tensor.dtype)
    tensor, layout = own(mesh, tensor, layout)
    wide = tensor.to(wanted).to(_wide(wanted) or wanted)
    axes = axes_in([layout.dims[dim]])
    largest = torch.stack(all_gather(mesh.comm, wide.amax(dim, keepdim=True), mesh.ranks_along(axes))).amax(0)
    wide = wide - torch.nan_to_num(largest, nan=torch.nan, posinf=torch.inf, neginf=0.0)
    total = sum_over_ranks(mesh, wide.exp().sum(dim, keepdim=True), axes)
    result = wide - total.log() if "log" in func.__name__ else wide.exp() / total
    return mark(result.to(wanted), layout)


@rule(F.normalize)
def normalize(
    mesh: Mesh, func: Any, tensor: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    layout = require_layout(tensor)
    if any(is_sharded(layout.dims[d]) for d in _dims(dim, layout.ndim)):
        raise NotExactError("it normalises over a sharded dimension")
    return mark(func(tensor, p, dim, eps, out), layout)


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None or dim == () or dim == []:
        return list(range(ndim))
    chosen: Sequence[int] = [dim] if isinstance(dim, int) else dim
    return [d % ndim for d in chosen]


def _reduced(layout: Layout, dims: Sequence[int], keepdim: bool) -> Layout:
    kept = [(plain(1) if i in dims else dim) for i, dim in enumerate(layout.dims) if keepdim or i not in dims]
    return Layout(tuple(kept))


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to add in: at least float32; None: torch's choice."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
