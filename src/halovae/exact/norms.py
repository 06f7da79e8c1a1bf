"""Normalisations. Those over channels are local; GroupNorm's statistics are merged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.comm import all_gather
from halovae.errors import NotExactError
from halovae.exact.halo import own
from halovae.exact.layout import axes_in, global_length, is_sharded, layout_of, length, mark
from halovae.exact.registry import Mesh, rule

_CHUNK_BYTES = 1 << 26
"""Low-precision activations are widened for their statistics in pieces of this size, not all at once."""


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

    Count, mean and sum of squared deviations of the shards are merged pairwise exactly (Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979), in float32 or better.
    """
    layout = layout_of(tensor)
    axes = axes_in(layout.dims[1:]) if layout else set[int]()
    if layout is None or not axes:
        return mark(func(tensor, num_groups, weight, bias, eps), layout)
    if is_sharded(layout.dims[1]):
        raise NotExactError("the channels of a group norm are sharded")
    tensor, layout = own(mesh, tensor, layout)
    mean, deviation = _statistics(tensor, num_groups)
    local = tensor[0].numel() // num_groups
    ranks = mesh.ranks_along(axes)
    gathered = all_gather(mesh.comm, torch.stack((mean, deviation, torch.full_like(mean, local))), ranks)
    mean, deviation = _merged(gathered)
    count = tensor.shape[1] // num_groups
    for dim in layout.dims[2:]:
        count *= global_length(dim)
    return mark(_normalized(tensor, mean, deviation / count, weight, bias, eps), layout)


def _statistics(tensor: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, each `[N, groups]`, in float32 or better."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows = tensor.shape[1] // groups
    mean = torch.empty(tensor.shape[0], groups, dtype=wide, device=tensor.device)
    deviation = torch.empty_like(mean)
    step = max(1, _CHUNK_BYTES // max(1, tensor[0, :rows].numel() * mean.element_size()))
    for n in range(tensor.shape[0]):
        for low in range(0, groups, step):
            high = min(low + step, groups)
            piece = tensor[n, low * rows : high * rows].to(wide).reshape(high - low, -1)
            variance, average = torch.var_mean(piece, dim=1, correction=0)
            mean[n, low:high] = average
            deviation[n, low:high] = variance * piece.shape[1]
    return mean, deviation


def _merged(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics of the union of shards, from (mean, deviation, count) of each."""
    mean, deviation, count = parts[0]
    for other_mean, other_deviation, other_count in parts[1:]:
        total = count + other_count
        delta = other_mean - mean
        mean = mean + delta * (other_count / total)
        deviation = deviation + other_deviation + delta * delta * (count * other_count / total)
        count = total
    return mean, deviation


def _normalized(
    tensor: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise in one pass: with its statistics given, batch norm is that pass, and widens inside."""
    channels = tensor.shape[1]
    per_channel = channels // mean.shape[1]
    wide = mean.dtype
    scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
    out = torch.empty_like(tensor)
    for n in range(tensor.shape[0]):
        average, spread = (s[n].repeat_interleave(per_channel) for s in (mean, variance))
        out[n : n + 1] = F.batch_norm(tensor[n : n + 1], average, spread, scale, shift, training=False, eps=eps)
    return out


@rule(F.layer_norm, F.rms_norm)
def over_last_dims(
    mesh: Mesh, func: Any, tensor: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    layout = layout_of(tensor)
    if layout and any(is_sharded(dim) for dim in layout.dims[-len(normalized_shape) :]):
        raise NotExactError("it normalises over a sharded dimension")
    return mark(func(tensor, normalized_shape, *args, **kwargs), layout)


@rule(F.batch_norm)
def batch_norm(mesh: Mesh, func: Any, tensor: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
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
