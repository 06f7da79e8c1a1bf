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
from halovae.exact.layout import axes_in, global_length, is_sharded, length, mark, require_layout
from halovae.exact.mesh import Mesh
from halovae.exact.rules.indexing import dims_of, reduced, require_plain
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
    require_plain(layout, range(-len(normalized_shape), 0), "it normalises over a sharded dimension")
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
        return mark(func(tensor, dims, keepdim, dtype=dtype), reduced(layout, dims, keepdim))
    tensor, layout = own(mesh, tensor, layout)
    axes = axes_in(layout.dims[d] for d in dims)
    total = sum_over_ranks(mesh, torch.sum(tensor, dims, keepdim, dtype=dtype or _wide(tensor.dtype)), axes)
    if getattr(func, "__name__", "") == "mean":
        total = total / prod(global_length(layout.dims[d]) for d in dims)
    if dtype is None and tensor.is_floating_point():
        total = total.to(tensor.dtype)
    return mark(total, reduced(layout, dims, keepdim))


def _asked(
    ndim: int, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: torch.dtype | None = None
) -> tuple[list[int], bool, torch.dtype | None]:
    """Dimensions, keepdim and dtype, however the caller spelled them."""
    return dims_of(axis if dim is None else dim, ndim), keepdim, dtype


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


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to add in: at least float32; None: torch's choice."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
