"""Nearest upsampling by two, folded into the 3 x 3 convolution that follows.

Every output pixel of such a pair sees four of the small picture's pixels, two of them through sums of weights. So the
pair is one transposed convolution of stride two with a 4 x 4 kernel: 16 products where the pair takes 36.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.cpu.pieces import WINDOW_BYTES
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import convolutions
from halovae.kernels.kept import derived
from halovae.kernels.lazy.deferred import OfBase, Recipe, plain, recipe_of
from halovae.kernels.lazy.joined import joined_in
from halovae.kernels.memory_format import memory_format
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import alike, device_type, in_turn


@dataclass(frozen=True)
class Upsampled(OfBase):
    """`[B, C, H, W]` with every pixel twice in height and width; a recipe."""

    base: Tensor
    dtype: torch.dtype
    """Of the result. The base may have another: repeating and casting commute."""
    mode: str
    time: Repeated | None = None
    """Where the pictures are frames of videos that are repeated in time too: those videos."""

    @property
    def shape(self) -> tuple[int, ...]:
        batch, channels, height, width = self.base.shape
        return self.time.shape[0] * self.time.shape[2] if self.time else batch, channels, 2 * height, 2 * width

    def cast(self, dtype: torch.dtype) -> Upsampled:
        return replace(self, dtype=dtype)

    def compute(self) -> Tensor:
        return self.in_time(F.interpolate(plain(self.base).to(self.dtype), scale_factor=2.0, mode=self.mode))

    def in_time(self, pictures: Tensor) -> Tensor:
        """What was made of each frame, as often as the frame is repeated in time."""
        if self.time is None or not self.time.shifts[0]:
            return pictures
        video = pictures.unflatten(0, (len(self.time.base), -1)).transpose(1, 2)
        return (
            replace(self.time, base=video, shifts=(self.time.shifts[0], 0, 0)).compute().transpose(1, 2).flatten(0, 1)
        )

    def as_video(self) -> Repeated | None:
        """Pictures as videos of one frame."""
        if self.time or self.base.dtype != self.dtype or device_type(self.device) == "cpu":
            return None
        return Repeated(self.base.unsqueeze(2), (0, 1, 1))


@dataclass(frozen=True)
class Repeated(OfBase):
    """`[B, C, T, H, W]` with every position several times in each direction; a recipe, on accelerators."""

    base: Tensor
    shifts: tuple[int, int, int]
    """Two to the power of these times, in time, height and width."""
    first: bool = False
    """Whether the first frame stays one."""

    @property
    def shape(self) -> tuple[int, ...]:
        batch, channels, frames, *sizes = self.base.shape
        frames = 1 + (frames - 1 << self.shifts[0]) if self.first else frames << self.shifts[0]
        return batch, channels, frames, sizes[0] << self.shifts[1], sizes[1] << self.shifts[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def channels_last(self) -> bool:
        return True

    def as_frames(self) -> Upsampled | None:
        """The frames of the videos, one after the other, where each is upsampled by two."""
        if self.shifts[1:] != (1, 1):
            return None
        return Upsampled(self.base.transpose(1, 2).flatten(0, 1), self.dtype, "nearest", time=self)

    def compute(self) -> Tensor:
        base, out = self.base, torch.empty(
            self.shape, dtype=self.dtype, device=self.device, memory_format=memory_format(5, True)
        )  # fmt: skip
        if self.first:
            _repeat(base[:, :, :1], out[:, :, :1], (0, *self.shifts[1:]))
            base, rest = base[:, :, 1:], out[:, :, 1:]
        else:
            rest = out
        if base.shape[2]:
            _repeat(base, rest, self.shifts)
        return out


def _repeat(base: Tensor, out: Tensor, shifts: Sequence[int]) -> None:
    pairs = [n for size, shift in zip(base.shape[2:], shifts, strict=True) for n in (size, 1 << shift)]
    single = [n for size in base.shape[2:] for n in (size, 1)]
    out.view(*base.shape[:2], *pairs).copy_(base.reshape(*base.shape[:2], *single))


def repeats_of(base: Tensor, size: Any, scale: Any) -> Repeated | None:
    """The nearest resampling of videos as `F.interpolate` takes it; None where it is not by powers of two."""
    each = size if size is not None else scale
    targets = list(each) if isinstance(each, (tuple, list)) else [each] * 3
    lengths = base.shape[2:]
    factors = [target / length if size is not None else target for target, length in zip(targets, lengths, strict=True)]
    shifts = [next((k for k in range(6) if factor == 1 << k), None) for factor in factors]
    time, height, width = shifts
    return None if time is None or height is None or width is None else Repeated(base, (time, height, width))


def joined_repeats(recipes: Sequence[Any]) -> Repeated | None:
    """One frame and others after it, repeated alike in height and width."""
    if len(recipes) != 2 or not all(isinstance(recipe, Repeated) and not recipe.first for recipe in recipes):
        return None
    one, others = recipes
    if one.shape[2] != 1 or one.shifts[1:] != others.shifts[1:]:
        return None
    return Repeated(torch.cat((one.base, others.base), 2), others.shifts, first=True)


@dataclass(frozen=True)
class FramesOf(OfBase):
    """Pictures that wait, as frames of videos; a recipe, on accelerators."""

    base: Recipe
    """`[B * T, C, H, W]`."""
    batch: int
    turned: bool
    """Whether the shape is `[B, T, C, H, W]`, not `[B, C, T, H, W]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        count, channels, *sizes = self.base.shape
        length = count // self.batch
        return (self.batch, *((length, channels) if self.turned else (channels, length)), *sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def channels_last(self) -> bool:
        return self.base.channels_last and not self.turned

    def compute(self) -> Tensor:
        turned = self.base.compute().unflatten(0, (self.batch, -1))
        return turned if self.turned else turned.transpose(1, 2)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is what its memory says, as those of classes that quantize, or share out, are not."""
    return type(weight) in (Tensor, torch.nn.Parameter)


def foldable(
    tensor: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Upsampled | None:
    """The upsampling that waits in a tensor, where `upsampled_convolution` can do this convolution of it."""
    recipe, geometry = recipe_of(tensor), (tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    fits = geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and weight.dtype == tensor.dtype and is_plain(weight)
    return recipe if fits and isinstance(recipe, Upsampled) else None


def upsampled_convolution(
    recipe: Upsampled, weight: Tensor, bias: Tensor | None, base: Tensor | None = None, bordered: Collection[int] = ()
) -> Tensor:
    """The 3 x 3 convolution with padding 1 of a deferred upsampling. `[B, C, 2H, 2W]` to `[B, C', 2H, 2W]`.

    Args:
        base: the small picture, if it is not the recipe's own. It may be deferred.
        bordered: dimensions (2, 3) in which `base` has one more row before and after, and no padding is due.
    """
    base = plain(recipe.base) if base is None else base
    bias = None if bias is None else bias.contiguous()  # The kernels read it as it lies.
    return recipe.in_time(_convolved(recipe, weight, bias, base, bordered))


def _convolved(
    recipe: Upsampled, weight: Tensor, bias: Tensor | None, base: Tensor, bordered: Collection[int]
) -> Tensor:  # fmt: skip
    if device_type(recipe.device) != "cpu" and recipe.dtype in LOW:
        return convolutions.convolve_upsampled(plain(base).to(recipe.dtype), weight, bias, bordered)
    weight, dtype = alike(weight, base), recipe.dtype
    work = torch.float32 if dtype in LOW else dtype  # Sums of weights are not exact enough in less.
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
    step = max(4, WINDOW_BYTES * torch.get_num_threads() // (batch * channels * base.shape[3] * work.itemsize))
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
