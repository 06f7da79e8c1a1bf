"""Convolutions by Triton's kernels where they win over the vendor library."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from halovae.kernels.gpu import operators, support
from halovae.kernels.kept import derived
from halovae.kernels.memory_format import memory_format
from halovae.kernels.precision import LOW

FEW_POSITIONS = 1 << 14
"""Of the output. Below, the vendor library has kernels that share out the sum; above, ours fills the device."""

_DEPTH = 16
"""Input channels that are read at once, at least."""


def convolves(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], positions: int) -> bool:
    """Whether the convolution is one that Triton's kernel is faster at than the vendor library, as measured on Hopper.

    It is where the library pads input channels to its tiles of 64 (96 of them: 385 TFLOP/s beside 294; where nothing
    is padded the library has 600 to 800), of the three channels of a sample over time, for which it has no kernel with
    tensor cores, and with the padding of one side only that strided convolutions have.
    """
    _, inputs, *taps = weight.shape
    fits = weight.dtype in LOW and stride[-1] == stride[-2] and {*dilation} == {1} and (*stride[:-2], 1)[0] == 1
    wins = (16 < inputs <= 128 and inputs % 64 > 0) or stride[-1] == 2 or _is_sample(weight, stride[-1])
    return fits and wins and taps[-1] == taps[-2] == 3 and support.are_many(positions, FEW_POSITIONS)


def convolve(
    picture: Tensor, weight: Tensor, bias: Tensor | None, *, first_tap: int, stride: int, before: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Convolve `[B, C, (T,) H, W]` without padding in time.

    Args:
        picture: the input.
        weight: `[outputs, C, (taps,) 3, 3]`.
        bias: of the outputs, or None.
        first_tap: taps in time before this one are left out.
        stride: in height and width.
        before: zeros above and to the left; as many follow as `size` asks for.
        size: rows and columns of the output.
    """
    from halovae.kernels.gpu import triton_convolution

    used = weight.narrow(2, first_tap, weight.shape[2] - first_tap) if first_tap else weight
    few = _is_sample(weight, stride)
    inputs = _DEPTH if few else weight.shape[1]
    tile = triton_convolution.tile_for(inputs, weight.shape[0])
    packed = derived(
        weight,
        ("gpu", first_tap, tile),
        lambda: triton_convolution.pack(_taps_as_channels(used) if few else used, tile),
    )
    if few:
        picture = _neighbours_as_channels(picture, weight.shape[-1], before[1], size[1])
        used, before = used[..., :1], (before[0], 0)
    taps = (1, *used.shape[2:])[-3:]
    length = picture.shape[2] - taps[0] + 1
    shape = (len(picture), len(weight), *((length,) if picture.ndim == 5 else ()), *size)
    return _by_frames(picture, shape, packed, bias, tile, kernel=taps, stride=stride, before=before)


def _is_sample(weight: Tensor, stride: int) -> bool:
    """Whether a convolution over time has so few inputs that all that meets a row of its kernel is read at once."""
    return weight.ndim == 5 and weight.shape[1] * weight.shape[-1] <= _DEPTH and stride == 1


def _taps_as_channels(weight: Tensor) -> Tensor:
    """`[outputs, C, T, H, W]` as `[outputs, 16, T, H, 1]`, zeros at the end."""
    rows = weight.movedim(-1, 1).flatten(1, 2)
    return torch.nn.functional.pad(rows, (0,) * 5 + (_DEPTH - rows.shape[1],)).unsqueeze(-1)


def _neighbours_as_channels(video: Tensor, taps: int, left: int, width: int) -> Tensor:
    """What the taps of a row meet, as channels: `[B, C, T, H, W]` to `[B, 16, T, H, width]`, with zeros around."""
    batch, channels, *sizes = video.shape
    out = torch.zeros((batch, *sizes[:2], width, _DEPTH), dtype=video.dtype, device=video.device).movedim(-1, 1)
    for tap in range(taps):
        low, high = max(0, left - tap), min(width, sizes[2] + left - tap)
        target = out.narrow(1, tap * channels, channels).narrow(4, low, high - low)
        target.copy_(video.narrow(4, low - left + tap, high - low))
    return out


def convolve_upsampled(picture: Tensor, weight: Tensor, bias: Tensor | None, bordered: Collection[int] = ()) -> Tensor:
    """Double `[B, C, H, W]` in height and width by repeating, and convolve it with `[outputs, C, 3, 3]`, padding 1.

    In `bordered` dimensions the picture has one more row before and after, and no padding is due.
    """
    from halovae.kernels.gpu import triton_convolution

    tile = triton_convolution.tile_for(weight.shape[1], weight.shape[0])
    packed = derived(weight, ("gpu upsampled", tile), lambda: triton_convolution.pack_upsampled(weight, tile))
    top, left = (0 if dim in bordered else 1 for dim in (2, 3))
    size = (2 * (picture.shape[2] - 2 * (1 - top)), 2 * (picture.shape[3] - 2 * (1 - left)))
    shape = (len(picture), len(weight), *size)
    return _by_frames(picture, shape, packed, bias, tile, kernel=(1, 2, 2), stride=1, before=(top, left), upsample=2)


def _by_frames(
    picture: Tensor, shape: Sequence[int], packed: Tensor, bias: Tensor | None, tile: Any, **geometry: Any
) -> Tensor:
    """Pictures are frames without a kernel in time; videos are taken one by one."""
    from halovae.kernels.gpu.triton_convolution import convolve as convolve_frames

    last = memory_format(picture.ndim, True)
    picture = picture.contiguous(memory_format=last)
    out = torch.empty(shape, dtype=picture.dtype, device=picture.device, memory_format=last)
    videos = [(picture, out)] if picture.ndim == 4 else zip(picture.transpose(1, 2), out.transpose(1, 2), strict=True)
    for source, target in videos:
        if out.is_meta:
            operators.convolve(source, packed, bias, out=target, **geometry)
            continue
        convolve_frames(source.movedim(1, -1), packed, bias, tile, out=target.movedim(1, -1), **geometry)
    return out
