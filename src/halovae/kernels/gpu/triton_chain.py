"""Bias, sum, norm over channels, scale and activation of channels-last positions in one pass, written in Triton."""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_ELEMENTS = 4096
"""Of a tile: enough to keep the memory busy, few enough for the registers."""


def run(
    positions: Tensor,
    out: Tensor,
    *,
    shift: Tensor | float | None = None,
    other: Tensor | None = None,
    normalize: float | None = None,
    mean: bool = False,
    times: Tensor | float | None = None,
    plus: Tensor | float | None = None,
    by: Tensor | None = None,
    more: Tensor | None = None,
    spread: Sequence[int] | None = None,
    silu: bool = False,
    room: Sequence[int] | None = None,
) -> None:
    """Write `activation((normalized(positions + shift + other) * times + plus) * by + more)`.

    It is calculated in float32 and rounded once.

    Args:
        positions: `[P, C]`, dense.
        out: likewise, any floating dtype; where there is `room`, the first of the places that it tells.
        shift: in float32 `[C]`, or `[N, C]` for N pictures of equally many positions; or a number, or None.
        other: as `positions`, or None.
        normalize: least length to divide by; None: no norm.
        mean: divide by the root of (the mean square + `normalize`) instead.
        times: as `shift`.
        plus: as `shift`.
        by: `[P', C]`, positions of a smaller video; or None.
        more: likewise.
        spread: how their positions stand for those of the video: its frames, rows and columns, their frames, whether
            the first frame stands for one only, and the binary logarithms of the repeats in time, height and width.
        silu: whether x * sigmoid(x) follows.
        room: rows and columns of the pictures, pictures of a video, and how many elements apart in `out` videos,
            pictures and rows begin.
    """
    count, channels = positions.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // padded)
    each = count // max(len(p) if isinstance(p, Tensor) and p.ndim == 2 else 1 for p in (shift, times, plus))
    frames, height, width, small, first, time, down, across = spread or (1,) * 8
    height, width, length, video_step, frame_step, row_step = room or (height, width, 1, 0, 0, 0)
    _chain[(triton.cdiv(count, rows),)](
        positions, out, shift, other, times, plus, by, more, count, each, normalize or 0.0, frames, height, width,
        small, length, video_step, frame_step, row_step, C=channels, PADDED=padded, ROWS=rows, SHIFT=_kind(shift),
        OTHER=other is not None, NORM=0 if normalize is None else 1 + mean, FACTOR=_kind(times), TERM=_kind(plus),
        BY=by is not None, MORE=more is not None, FIRST=int(first), TIME=time, DOWN=down, ACROSS=across, SILU=silu,
        ROOM=room is not None, num_warps=4,
    )  # fmt: skip


def _kind(parameter: Tensor | float | None) -> int:
    """0: none, 1: a number, 2: one for each channel, 3: also for each picture."""
    return 1 + parameter.ndim if isinstance(parameter, Tensor) else int(parameter is not None)


@triton.jit(do_not_specialize=("count", "each", "frames", "height", "width", "small", "length"))
def _chain(
    x, out, shift, other, factor, term, by, more, count, each, eps, frames, height, width, small, length,
    video_step, frame_step, row_step, C: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
    OTHER: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr, TERM: tl.constexpr, BY: tl.constexpr,
    MORE: tl.constexpr, FIRST: tl.constexpr, TIME: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    SILU: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live = (row < count)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if SHIFT:
        # Where nothing is live, nothing is to be normalized.
        value = tl.where(live, value + _parameter(shift, row // each, channel, live, C, SHIFT), 0.0)
    if OTHER:
        value = value + tl.load(other + place, mask=live, other=0.0).to(tl.float32)
    if NORM == 2:
        value = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / C + eps))[:, None]
    if NORM == 1:
        value = value / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), eps)[:, None]
    if FACTOR:
        value = value * _parameter(factor, row // each, channel, live, C, FACTOR)
    if TERM:
        value = value + _parameter(term, row // each, channel, live, C, TERM)
    if BY or MORE:
        line = row // width
        frame = line // height % frames
        frame = ((frame - FIRST) >> TIME) + FIRST
        line = (line // height // frames * small + frame) * (height >> DOWN) + (line % height >> DOWN)
        spot = (line * (width >> ACROSS) + (row % width >> ACROSS))[:, None] * C + channel[None, :]
        if BY:
            value = value * tl.load(by + spot, mask=live, other=0.0).to(tl.float32)
        if MORE:
            value = value + tl.load(more + spot, mask=live, other=0.0).to(tl.float32)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    if ROOM:
        line = row // width
        start = line // height // length * video_step + line // height % length * frame_step
        start += line % height * row_step + row % width * C
        place = start[:, None] + channel[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _parameter(parameter, picture, channel, live, C: tl.constexpr, KIND: tl.constexpr):
    """A number, or one for each channel, or for each channel of each picture."""
    if KIND == 1:
        value = parameter
    elif KIND == 2:
        value = tl.load(parameter + channel, mask=channel < C, other=0.0)[None, :]
    else:
        value = tl.load(parameter + picture[:, None] * C + channel[None, :], mask=live, other=0.0)
    return value
