"""Copying rows of channels-last pictures into a larger buffer, filling its border, and shuffling pixels, in Triton.

Such a row is one stretch of memory on both sides. torch's copy of a tensor with gaps goes element by element.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from halovae.base.geometry import Extent
from halovae.kernels.fill import Fill

_ELEMENTS = 2048
"""Of a row, copied at a time."""


def fits(frames: Tensor) -> bool:
    """Whether each row of `[T, H, W, C]` is one stretch of memory."""
    return frames.stride(3) == 1 and frames.stride(2) == frames.shape[3]


def run(frames: Tensor, out: Tensor) -> None:
    """Copy `[T, H, W, C]` into `out` of the same shape and dtype; both as `fits` says."""
    count, height, width, channels = frames.shape
    length = width * channels
    grid = (count * height, triton.cdiv(length, _ELEMENTS))
    _copy_rows[grid](
        frames, out, height, length, frames.stride(0), frames.stride(1), out.stride(0), out.stride(1),
        ELEMENTS=_ELEMENTS, num_warps=4,
    )  # fmt: skip


def run_fill(videos: Tensor, sides: Sequence[tuple[Extent, Fill]]) -> None:
    """Fill `[B, T, H, W, C]` around what is there.

    Args:
        videos: each row of them as `fits` says.
        sides: for time, height and width: what is there, and what lies beyond it. Of two values the later one wins.
    """
    batch, frames, height, width, channels = videos.shape
    extents, fills = zip(*sides, strict=True)
    _fill[(batch * frames * height,)](
        videos, frames, height, width, *videos.stride()[:3], *(place for extent in extents for place in extent),
        *(fill.value for fill in fills), C=channels, **{
            name: _MODES.index(fill.mode) for name, fill in zip(("TIME", "DOWN", "ACROSS"), fills, strict=True)
        }, ELEMENTS=_ELEMENTS, num_warps=4,
    )  # fmt: skip


_MODES = "constant", "replicate", "reflect"

Dim = tuple[int, int, int]
"""Size, and stride in the source and in the result, in elements."""

_PIXELS, _ROWS = 3, 4
"""The most dimensions of each kind."""


class Shuffle(NamedTuple):
    """How pixels and channels change places."""

    pixels: tuple[Dim, ...]
    """Dimensions whose positions become channels, or come from them; where they lie within, the last is the inmost."""
    channels: Dim
    rows: tuple[Dim, ...]
    """The other dimensions."""


def shuffle_of(shape: Sequence[int], source: Sequence[int], out: Sequence[int]) -> Shuffle | None:
    """The shuffle that a copy is, from its shape and both strides; None where it is none.

    Dimension 1 is that of the channels. They are next to each other on one side; on the other, pixels lie within.
    """
    dims = list(zip(shape, source, out, strict=True))
    side = 2 if source[1] == 1 else 1  # where the pixels lie within
    channels, others = dims[1], [dim for place, dim in enumerate(dims) if place != 1 and dim[0] > 1]
    pixels = sorted((dim for dim in others if dim[side] < channels[side]), key=lambda dim: -dim[side])
    rows = [dim for dim in others if dim not in pixels]
    small = prod(size for size, *_ in pixels)
    close = channels[3 - side] == 1 and channels[side] == small and _is_run(pixels, side)
    powers = all(size & (size - 1) == 0 for size, *_ in pixels)
    fits_in = 1 <= len(pixels) <= _PIXELS and len(rows) <= _ROWS and powers and small <= 64
    return Shuffle(tuple(pixels), channels, tuple(rows)) if close and fits_in else None


def _is_run(pixels: Sequence[Dim], side: int) -> bool:
    """Whether they are next to each other in memory."""
    step = 1
    for dim in reversed(pixels):
        if dim[side] != step:
            return False
        step *= dim[0]
    return True


def run_shuffle(source: Tensor, out: Tensor, shuffle: Shuffle) -> None:
    """`out.copy_(source)`."""
    one = (1, 0, 0)
    pixels = (*(one,) * (_PIXELS - len(shuffle.pixels)), *shuffle.pixels)
    rows = (*(one,) * (_ROWS - len(shuffle.rows)), *shuffle.rows)
    small, (channels, inside, outside) = prod(size for size, *_ in pixels), shuffle.channels
    block = min(triton.next_power_of_2(channels), max(16, _ELEMENTS // small))
    _shuffle[(prod(size for size, *_ in rows), triton.cdiv(channels, block))](
        source, out, *(number for row in rows for number in row), channels,
        *(step for _, *steps in pixels for step in steps), INSIDE=inside, OUTSIDE=outside, P1=pixels[1][0],
        P2=pixels[2][0], PIXELS=small, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("n0", "n1", "n2", "n3"))
def _shuffle(
    source, out, n0, a0, b0, n1, a1, b1, n2, a2, b2, n3, a3, b3, channels, i0, j0, i1, j1, i2, j2,
    INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    """All pixels of one place, and some channels: read in the order of one side, written in that of the other."""
    row = tl.program_id(0).to(tl.int64)
    begin = source + row % n3 * a3 + row // n3 % n2 * a2 + row // (n3 * n2) % n1 * a1 + row // (n3 * n2 * n1) * a0
    end = out + row % n3 * b3 + row // n3 % n2 * b2 + row // (n3 * n2) % n1 * b1 + row // (n3 * n2 * n1) * b0
    pixel = tl.arange(0, PIXELS)[:, None]
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    z, y, x = pixel // (P2 * P1), pixel // P2 % P1, pixel % P2
    # The side where pixels are next to each other is said plainly, so that the compiler sees that they are.
    there = pixel if INSIDE == PIXELS else z * i0 + y * i1 + x * i2
    here = pixel if OUTSIDE == PIXELS else z * j0 + y * j1 + x * j2
    live = channel < channels
    value = tl.load(begin + there + channel * INSIDE, mask=live)
    tl.store(end + here + channel * OUTSIDE, value, mask=live)


@triton.jit(do_not_specialize=("height",))
def _copy_rows(
    source, out, height, length, source_frame, source_row, out_frame, out_row, ELEMENTS: tl.constexpr
):  # fmt: skip  # pyright: ignore
    number = tl.program_id(0).to(tl.int64)
    frame, row = number // height, number % height
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(source + frame * source_frame + row * source_row + element, mask=element < length)
    tl.store(out + frame * out_frame + row * out_row + element, value, mask=element < length)


@triton.jit(do_not_specialize=("frames", "height", "width", "t0", "t1", "y0", "y1", "x0", "x1"))
def _fill(
    videos, frames, height, width, video_step, frame_step, row_step, t0, t1, y0, y1, x0, x1, before, around, beside,
    C: tl.constexpr, TIME: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    """A row: all of it, or, where it is there already, its two ends."""
    line = tl.program_id(0).to(tl.int64)
    t, y = line // height % frames, line % height
    start = videos + line // (height * frames) * video_step
    out = start + t * frame_step + y * row_step
    source = start + _inside(t, t0, t1, TIME) * frame_step + _inside(y, y0, y1, DOWN) * row_step
    is_above, is_before = (y < y0) | (y >= y1), (t < t0) | (t >= t1)
    is_there = (is_above | is_before) == 0
    count = tl.where(is_there, width - (x1 - x0), width) * C
    for first in range(0, count, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        x = element // C
        x = tl.where(is_there & (x >= x0), x + (x1 - x0), x)
        is_beside = (x < x0) | (x >= x1)
        value = tl.load(source + _inside(x, x0, x1, ACROSS) * C + element % C, mask=element < count)
        if TIME == 0:
            value = tl.where(is_before, before, value)
        if DOWN == 0:
            value = tl.where(is_above, around, value)
        if ACROSS == 0:
            value = tl.where(is_beside, beside, value)
        tl.store(out + x * C + element % C, value.to(videos.dtype.element_ty), mask=element < count)


@triton.jit
def _inside(place, low, high, MODE: tl.constexpr):
    """The place that is repeated, or mirrored, at another one."""
    if MODE == 2:
        place = tl.where(place < low, 2 * low - place, place)
        place = tl.where(place >= high, 2 * (high - 1) - place, place)
    else:
        place = tl.minimum(tl.maximum(place, low), high - 1)
    return place
