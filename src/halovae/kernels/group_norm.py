"""GroupNorm in two steps: statistics of a picture, or of parts of it that are merged, and the pass that normalises.

Statistics are moments: count, mean and sum of squared deviations. Those of a union follow exactly from those of its
parts (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.gpu import fused, operators, support
from halovae.kernels.lazy.chain import Chain, Seen
from halovae.kernels.lazy.deferred import Deferred, plain, recipe_of
from halovae.kernels.lazy.joined import read
from halovae.kernels.memory_format import is_dense_channels_last
from halovae.kernels.precision import LOW

_CHUNK_BYTES = 1 << 26
"""Low-precision pictures are widened for their statistics in pieces of this size, not all at once."""


def on_gpu(picture: Tensor) -> bool:
    """Whether kernels of this package normalise `[N, C, ...]`."""
    return picture.ndim in (3, 4, 5) and picture.dtype in (torch.float32, *LOW) and support.supports(picture.device)


def group_norm(picture: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As torch.nn.functional.group_norm, of what `on_gpu` says yes to; may be deferred."""
    source = _source(picture)
    return _scaled(source, picture, fused.affine(_parts(source, groups), groups, source.shape[1], weight, bias, eps))


def moments(picture: Tensor, groups: int) -> Tensor:
    """`[3, N, groups]`, in float32 or better: count, mean, sum of squared deviations of `[N, C, ...]`."""
    if on_gpu(picture):
        return operators.merged(_parts(_source(picture), groups), groups)
    picture = plain(picture)
    wide = torch.float64 if picture.dtype == torch.float64 else torch.float32
    rows = picture.shape[1] // groups
    found = torch.empty(3, len(picture), groups, dtype=wide, device=picture.device)
    step = max(1, _CHUNK_BYTES // max(1, picture[0, :rows].numel() * wide.itemsize))
    for n in range(len(picture)):
        for low in range(0, groups, step):
            high = min(low + step, groups)
            piece = picture[n, low * rows : high * rows].to(wide).reshape(high - low, -1)
            variance, mean = torch.var_mean(piece, dim=1, correction=0)
            found[0, n, low:high] = piece.shape[1]
            found[1, n, low:high] = mean
            found[2, n, low:high] = variance * piece.shape[1]
    return found


def normalized(
    picture: Tensor, parts: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The picture normalised by the union of `parts`, moments as above; may be deferred."""
    groups, channels = parts[0].shape[-1], picture.shape[1]
    if on_gpu(picture):
        affine = fused.affine(torch.stack(list(parts)), groups, channels, weight, bias, eps)
        return _scaled(_source(picture), picture, affine)
    picture = plain(picture)
    count, mean, deviation = _union(parts)
    scale, shift = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    out = torch.empty_like(picture)
    for n in range(len(picture)):
        average, spread = (s[n].repeat_interleave(channels // groups) for s in (mean, deviation / count))
        # One pass: with its statistics given, batch norm is that, and widens inside.
        out[n : n + 1] = F.batch_norm(picture[n : n + 1], average, spread, scale, shift, training=False, eps=eps)
    return out


def _union(parts: Sequence[Tensor]) -> Tensor:
    count, mean, deviation = parts[0]
    for other_count, other_mean, other_deviation in parts[1:]:
        total = count + other_count
        delta = other_mean - mean
        mean = mean + delta * (other_count / total)
        deviation = deviation + other_deviation + delta * delta * (count * other_count / total)
        count = total
    return torch.stack((count, mean, deviation))


def _source(picture: Tensor) -> Chain:
    """What is normalised, as a picture: a tensor, to which a bias may still have to be added."""
    recipe = recipe_of(picture)
    if isinstance(recipe, Seen) and (found := _seen(recipe)) is not None:
        recipe = found
    if isinstance(recipe, Chain) and recipe.dtype == recipe.base.dtype and _shift(recipe) is not NotImplemented:
        return recipe
    tensor = plain(read(picture))
    return Chain(tensor.unsqueeze(-1) if picture.ndim == 3 else tensor, picture.dtype)


def _seen(seen: Seen) -> Chain | None:
    """A view of a tensor and its bias as the bias of a view of the tensor; None where that is something else."""
    chain, shape = seen.chain, seen.shape
    same_channels = len(shape) in (4, 5) and shape[1] == chain.shape[1] and seen.example.stride(1) == 1
    if not isinstance(chain, Chain) or not same_channels or not is_dense_channels_last(chain.base):
        return None
    if (bias := _shift(chain)) is NotImplemented:
        return None
    base = chain.base
    for view in seen.views:
        base = view(base)
    found = Chain(base, chain.dtype)
    return found if bias is None else found.plus(bias.view(-1, *[1] * (len(shape) - 2)))


def _shift(source: Chain) -> Any:
    """The bias that a chain adds, `[C]` or None; NotImplemented where it does anything else."""
    if not source.steps:
        return None
    *others, step = source.steps
    if others or step.kind != "plus" or not isinstance(step.value, Tensor):
        return NotImplemented
    value = step.value
    is_bias = value.numel() == source.shape[1] and value.ndim >= source.base.ndim - 1
    return value.flatten() if is_bias and value.shape[1 - source.base.ndim] == value.numel() else NotImplemented


def _parts(source: Chain, groups: int) -> Tensor:
    return fused.moments(source.base, groups, _shift(source))


def _scaled(source: Chain, picture: Tensor, affine: Tensor) -> Tensor:
    factor, term = (each.reshape(*each.shape, *[1] * (source.base.ndim - 2)) for each in affine.unbind())
    scaled = source.times(factor).plus(term)
    return Deferred(scaled) if picture.ndim > 3 else scaled.compute().squeeze(-1)
