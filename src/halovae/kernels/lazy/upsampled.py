"""Nearest upsampling by two, folded into the 3 x 3 convolution that follows.

Every output pixel of such a pair sees four of the small picture's pixels, two of them through sums of weights. So the
pair is one transposed convolution of stride two with a 4 x 4 kernel: 16 products where the pair takes 36.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.cpu.slabs import WINDOW_BYTES, threads
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import dispatch
from halovae.kernels.lazy.deferred import plain, recipe_of
from halovae.kernels.lazy.joined import joined_in
from halovae.kernels.memory_format import is_channels_last, memory_format
from halovae.kernels.precision import LOW, working_dtype
from halovae.kernels.shapes_only import alike, device_type, in_turn
from halovae.kernels.weight_cache import derived


@dataclass(frozen=True)
class Upsampled:
    """`[B, C, H, W]` with every pixel twice in height and width; a recipe."""

    base: Tensor
    dtype: torch.dtype
    """Of the result. The base may have another: repeating and casting commute."""
    mode: str

    @property
    def shape(self) -> tuple[int, ...]:
        batch, channels, height, width = self.base.shape
        return batch, channels, 2 * height, 2 * width

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.base)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return (self.base,)

    def cast(self, dtype: torch.dtype) -> Upsampled:
        return replace(self, dtype=dtype)

    def compute(self) -> Tensor:
        return F.interpolate(plain(self.base).to(self.dtype), scale_factor=2.0, mode=self.mode)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is what its memory says, as those of classes that quantize, or share out, are not."""
    return type(weight) in (Tensor, torch.nn.Parameter)


def foldable(
    tensor: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Upsampled | None:
    """The upsampling that waits in a tensor, where `upsampled_convolution` can do this convolution of it.

    Sums of weights are exact enough in float32 and float64 only.
    """
    recipe, geometry = recipe_of(tensor), (tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    fits = geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and weight.dtype == tensor.dtype and is_plain(weight)
    wide = device_type(tensor.device) != "cpu" or working_dtype(tensor.dtype) in (torch.float32, torch.float64)
    return recipe if fits and wide and isinstance(recipe, Upsampled) else None


def upsampled_convolution(
    recipe: Upsampled, weight: Tensor, bias: Tensor | None, base: Tensor | None = None, bordered: Collection[int] = ()
) -> Tensor:
    """The 3 x 3 convolution with padding 1 of a deferred upsampling. `[B, C, 2H, 2W]` to `[B, C', 2H, 2W]`.

    Args:
        recipe: the upsampling.
        weight: `[C', C, 3, 3]`.
        bias: `[C']`.
        base: the small picture, if it is not the recipe's own. It may be deferred.
        bordered: dimensions (2, 3) in which `base` has one more row before and after, and no padding is due.
    """
    base = plain(recipe.base) if base is None else base
    if device_type(recipe.device) != "cpu" and recipe.dtype in LOW:
        return dispatch.convolve_upsampled(plain(base).to(recipe.dtype), weight, bias, bordered)
    weight, dtype, work = alike(weight, base), recipe.dtype, working_dtype(recipe.dtype)
    folded = derived(weight, ("upsampled", work), lambda: _folded(weight.to(work)))
    bias = None if bias is None else bias.to(work)
    # What a border adds beyond the rows in question is cropped, as padding.
    crops = [3 if dim in bordered else 1 for dim in (2, 3)]
    last = memory_format(4, True)
    if work == dtype:
        return F.conv_transpose2d(plain(base).to(work).contiguous(memory_format=last), folded, bias, 2, crops)
    joined = joined_in(base).padded({} if 2 in bordered else {2: (1, 1)}, Fill())
    assert joined is not None, "a base comes without padding, or with zeros"
    batch, channels, rows, _ = joined.shape
    width = 2 * (base.shape[3] - (2 if 3 in bordered else 0))
    out = torch.empty(batch, len(weight), 2 * (rows - 2), width, dtype=dtype, device=base.device, memory_format=last)
    step = max(4, WINDOW_BYTES * threads() // (batch * channels * base.shape[3] * work.itemsize))
    for low in in_turn(range(0, rows - 2, step), out, lambda low: min(step, rows - 2 - low)):
        high = min(rows - 2, low + step)
        piece = F.conv_transpose2d(joined.slab(2, (low, high + 2), work, True), folded, bias, 2, (3, crops[1]))
        out.narrow(2, 2 * low, 2 * (high - low)).copy_(piece)
    return out


def _folded(weight: Tensor) -> Tensor:
    """The transposed convolution's weight `[C, C', 4, 4]` from the convolution's `[C', C, 3, 3]`."""
    for dim in (2, 3):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack((last, middle + last, first + middle, first), dim)
    return weight.transpose(0, 1).contiguous()
