"""Convolution of channels-last frames as one matrix product per tile of positions, written in Triton.

It reads pictures where they lie: zero padding on any side and nearest upsampling by two are a matter of which rows are
read, so neither is ever written to memory. Products of bfloat16 or float16 are added in float32 and rounded once.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes; chosen by measurement on Hopper."""

    positions: int
    channels: int
    """Output channels."""
    more_channels: int
    """Output channels in a second product, for counts between two powers of two."""
    depth: int
    """Input channels added at once."""
    warps: int
    stages: int

    @property
    def width(self) -> int:
        return self.channels + self.more_channels


def tile_for(inputs: int, outputs: int) -> Tile:
    """The tile for a convolution from `inputs` to `outputs` channels."""
    depth = next((d for d in (64, 32) if inputs % d == 0), 16)
    if outputs <= 16:
        return Tile(positions=256, channels=16, more_channels=0, depth=min(depth, 32), warps=4, stages=4)
    if outputs % 96 == 0 and outputs % 64:
        return Tile(positions=128, channels=64, more_channels=32, depth=min(depth, 32), warps=4, stages=4)
    if outputs % 192 == 0:
        return Tile(positions=128, channels=128, more_channels=64, depth=depth, warps=8, stages=3)
    if outputs % 128 == 0:
        return Tile(positions=128, channels=128, more_channels=0, depth=depth, warps=8, stages=3)
    return Tile(positions=128, channels=64, more_channels=0, depth=depth, warps=4, stages=4)


def pack(weight: Tensor, tile: Tile) -> Tensor:
    """Lay out a weight `[outputs, inputs, taps...]` as `[taps * inputs, outputs]`, filled up to whole tiles."""
    outputs = weight.shape[0]
    rows = weight.movedim((0, 1), (-1, -2)).reshape(-1, outputs)
    return torch.nn.functional.pad(rows, (0, -outputs % tile.width)).contiguous()


def pack_upsampled(weight: Tensor, tile: Tile) -> Tensor:
    """Lay out a weight `[outputs, inputs, 3, 3]` that follows nearest upsampling by two.

    Each pixel of the picture meets two taps in a row or one, so the nine taps sum to four for each of the four places
    that an output pixel can have on a picture pixel: 4/9 of the products.

    Returns:
        `[4, 4 * inputs, outputs]`.
    """
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    places: list[Tensor] = []
    for tall in _merged(wide, 2):
        places += [pack(both.to(weight.dtype), tile) for both in _merged(tall, 3)]
    return torch.stack(places)


def _merged(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Two taps for the first and for the second output pixel on a picture pixel."""
    before, middle, after = weight.unbind(dim)
    return torch.stack((before, middle + after), dim), torch.stack((before + middle, after), dim)


def convolve(
    frames: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    tile: Tile,
    *,
    kernel: Sequence[int],
    stride: int,
    before: tuple[int, int],
    out: Tensor,
    upsample: int = 1,
) -> None:
    """Convolve frames `[T, H, W, C]`, dense, into `out`, `[T', H', W', outputs]`, dense.

    Args:
        frames: the input.
        packed: of `pack`, or of `pack_upsampled` where `upsample` is 2.
        bias: of the outputs, or None.
        tile: the one that the weight was packed for.
        kernel: taps in time, height and width, after merging where upsampled. No padding in time.
        stride: in height and width.
        before: zeros before the first row and column; as many follow as `out` asks for.
        out: the output.
        upsample: 1, or 2 for a nearest upsampling in height and width before the convolution.
    """
    if frames.is_cuda and (patches := _patches()) and patches.fits(frames, packed, kernel, stride, out):
        patches.run(frames, packed, bias, kernel=kernel, before=before, out=out, upsample=upsample)
        return
    _launch(frames, packed, bias, tile, kernel=kernel, stride=stride, before=before, out=out, upsample=upsample)


def _launch(
    frames: Tensor, packed: Tensor, bias: Tensor | None, tile: Tile, *, kernel: Sequence[int], stride: int,
    before: tuple[int, int], out: Tensor, upsample: int,
) -> None:  # fmt: skip
    _, height, width, inputs = frames.shape
    outputs = out.shape[-1]
    grid_size = (out.shape[1] // upsample, out.shape[2] // upsample)
    count = out.shape[0] * grid_size[0] * grid_size[1]
    grid = (triton.cdiv(count, tile.positions), triton.cdiv(outputs, tile.width), upsample * upsample)
    _convolve[grid](
        frames, packed, bias, out, height, width, *grid_size, count,
        C=inputs, N=outputs, COLUMNS=packed.shape[-1], KT=kernel[0], KH=kernel[1], KW=kernel[2], STRIDE=stride,
        TOP=before[0], LEFT=before[1], UP=upsample, BIAS=bias is not None,
        BM=tile.positions, BN=tile.channels, BN2=tile.more_channels, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@functools.cache
def _patches() -> ModuleType | None:
    """`gpu_patches`, where Triton has what it is written in."""
    try:
        return importlib.import_module("halovae.kernels.gpu.gluon_patches")
    except (ImportError, AttributeError):
        return None


@triton.jit(do_not_specialize=("height", "width", "rows", "cols", "count"))
def _convolve(
    x, w, bias, out, height, width, rows, cols, count,
    C: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, UP: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    # `count` positions: of the output, or of the input where it is upsampled, once for each place on a pixel.
    place = tl.program_id(2)
    below, right = place // 2, place % 2
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    live = position < count
    frame, row, col = position // (rows * cols), position // cols % rows, position % cols
    top, left = row * STRIDE - TOP, col * STRIDE - LEFT
    if UP == 2:
        top, left = top + below, left + right
    origin = ((frame * height + top).to(tl.int64) * width + left) * C
    first = tl.program_id(1) * (BN + BN2)
    n = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    taps = w + place * (KT * KH * KW * C * COLUMNS)
    acc = tl.zeros((BM, BN), tl.float32)
    if BN2 > 0:
        n2 = first + BN + tl.arange(0, BN2)
        acc2 = tl.zeros((BM, BN2), tl.float32)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    for step in range(KT * KH * KW * STEPS):
        tap, low = step // STEPS, step % STEPS * BK
        dt, dy, dx = tap // (KH * KW), tap // KW % KH, tap % KW
        inside = live & (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
        source = x + (origin + ((dt * height + dy) * width + dx) * C + low)[:, None] + k[None, :]
        a = _load(source, inside[:, None], (low + k < C)[None, :], C % BK == 0)
        weight = taps + (tap * C + low + k)[:, None] * COLUMNS
        acc = tl.dot(a, _load(weight + n[None, :], None, (low + k < C)[:, None], C % BK == 0), acc)
        if BN2 > 0:
            acc2 = tl.dot(a, _load(weight + n2[None, :], None, (low + k < C)[:, None], C % BK == 0), acc2)
    out_row = (frame * rows + row) * UP + below
    target = out + ((out_row.to(tl.int64) * cols + col) * UP + right)[:, None] * N
    _store(target, bias, acc, n, live, N, BIAS)
    if BN2 > 0:
        _store(target, bias, acc2, n2, live, N, BIAS)


@triton.jit
def _load(source, mask, present, WHOLE: tl.constexpr):
    """Zeros where the mask says so, and where there are no more channels; without a mask where all is there."""
    if WHOLE:
        return tl.load(source) if mask is None else tl.load(source, mask=mask, other=0.0)
    return tl.load(source, mask=present if mask is None else mask & present, other=0.0)


@triton.jit
def _store(target, bias, total, n, live, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(target + n[None, :], total.to(target.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])
