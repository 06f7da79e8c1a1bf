"""Normalisations. Those over channels are local; GroupNorm's statistics are merged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.comm import all_gather
from halovae.exact.halo import own
from halovae.exact.layout import axes_in, is_sharded, layout_of, length, mark, require_whole
from halovae.exact.registry import Mesh, rule
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
    layout = layout_of(tensor)
    require_whole(weight, bias)
    axes = axes_in(layout.dims[1:]) if layout else set[int]()
    if layout is None or not axes or 0 in layout.shape:
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
    layout = layout_of(tensor)
    require_whole(*args, *kwargs.values())
    if layout and any(is_sharded(dim) for dim in layout.dims[-len(normalized_shape) :]):
        raise NotExactError("it normalises over a sharded dimension")
    return mark(func(tensor, normalized_shape, *args, **kwargs), layout)


@rule(F.batch_norm)
def batch_norm(mesh: Mesh, func: Any, tensor: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
    require_whole(mean, var, *args, *kwargs.values())
    training = kwargs.get("training", args[2] if len(args) > 2 else False)
    if layout and (training or is_sharded(layout.dims[1])):
        raise NotExactError("batch statistics are in use: call vae.eval() first")
    return mark(func(tensor, mean, var, *args, **kwargs), layout)


@rule(F.instance_norm)
def instance_norm(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
    if layout and any(is_sharded(dim) and length(dim) for dim in layout.dims[2:]):
        raise NotExactError("it normalises over sharded dimensions")
    return mark(func(tensor, *args, **kwargs), layout)
