"""Sums of pixels that became channels, and of means of groups of these, in one pass, written in Triton."""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_ELEMENTS = 4096
"""Of a tile, as it is read: enough to keep the memory busy, few enough for the registers."""

_MOST_CHANNELS = 512
"""Of a tile, as it is written."""


def run(terms: Sequence[Any], out: Tensor) -> None:
    """Write the sum of one or two terms, each a `copies.Term`, into a dense channels-last video `[B, C, T, H, W]`.

    It is calculated in float32 and rounded once.
    """
    batch, channels, frames, height, width = out.shape
    pixels, group = max(prod(t.shape[2:5]) for t in terms), max(t.group for t in terms)
    block = max(pixels, min(triton.next_power_of_2(channels), _MOST_CHANNELS))
    cols = max(1, min(triton.next_power_of_2(width), _ELEMENTS // (block * group)))
    grid = (batch * frames * height, triton.cdiv(width, cols), triton.cdiv(channels, block))
    one, other = (_arguments(term) for term in (terms[0], terms[-1]))
    _sum[grid](
        *one[0], *other[0], out, frames, height, width, channels, BLOCK=block, COLS=cols, BOTH=len(terms) == 2,
        **{f"{name}0": value for name, value in one[1].items()},
        **{f"{name}1": value for name, value in other[1].items()}, num_warps=4,
    )  # fmt: skip


def _arguments(term: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those that may be of any value, and those that the kernel is made for."""
    batch, _, *inner, _, row, col = term.steps
    length, back = 0, 0
    if term.before is not None:
        length, back = term.before.shape[2], term.before.storage_offset() - term.picture.storage_offset()
    numbers = (term.picture, term.shift, batch, row, *inner[:2], length, back)
    sizes = dict(zip(("P", "Q", "R"), term.shape[2:5], strict=True))
    return numbers, {"C": term.shape[1], **sizes, "STEP": inner[2], "COL": col, "GROUP": term.group,
                     "SHIFT": term.shift is not None, "BEFORE": term.before is not None}  # fmt: skip


@triton.jit(do_not_specialize=("length0", "length1", "frames", "height", "width"))
def _sum(
    x0, shift0, batch0, row0, deep0, down0, length0, back0,
    x1, shift1, batch1, row1, deep1, down1, length1, back1,
    out, frames, height, width, channels, BLOCK: tl.constexpr, COLS: tl.constexpr, BOTH: tl.constexpr,
    C0: tl.constexpr, P0: tl.constexpr, Q0: tl.constexpr, R0: tl.constexpr, STEP0: tl.constexpr, COL0: tl.constexpr,
    GROUP0: tl.constexpr, SHIFT0: tl.constexpr, BEFORE0: tl.constexpr,
    C1: tl.constexpr, P1: tl.constexpr, Q1: tl.constexpr, R1: tl.constexpr, STEP1: tl.constexpr, COL1: tl.constexpr,
    GROUP1: tl.constexpr, SHIFT1: tl.constexpr, BEFORE1: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    line = tl.program_id(0).to(tl.int64)
    video, frame, row = line // (height * frames), line // height % frames, line % height
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.program_id(2) * BLOCK
    value = _term(
        x0 + video * batch0 + row * row0, shift0, frame * P0, deep0, down0, length0, back0, col, width, first,
        C0, P0, Q0, R0, STEP0, COL0, GROUP0, SHIFT0, BEFORE0, COLS, BLOCK,
    )  # fmt: skip
    if BOTH:
        value = value + _term(
            x1 + video * batch1 + row * row1, shift1, frame * P1, deep1, down1, length1, back1, col, width,
            first, C1, P1, Q1, R1, STEP1, COL1, GROUP1, SHIFT1, BEFORE1, COLS, BLOCK,
        )  # fmt: skip
    channel = first + tl.arange(0, BLOCK)
    place = (line * width + col)[:, None] * channels + channel[None, :]
    live = (col < width)[:, None] & (channel < channels)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _term(
    x, shift, start, deep, down, length, back, col, width, first, C: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, COL: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    BEFORE: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    """`[COLS, BLOCK]`: channels are read in the order of memory, all pixels of a block with them."""
    CHANNELS: tl.constexpr = BLOCK * GROUP // (P * Q * R)
    channel = first * GROUP // (P * Q * R) + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, P * Q * R)
    here = start + pixel // (Q * R)
    depth = here * deep
    if BEFORE:
        depth = tl.where(here < length, depth + back, depth - length * deep)
    within = depth + pixel // R % Q * down + pixel % R * STEP
    live = (col < width)[:, None, None] & (channel < C)[None, :, None]
    place = (col * COL)[:, None, None] + within[None, None, :] + channel[None, :, None]
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if SHIFT:
        value = value + tl.load(shift + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :, None]
    if GROUP == 1:
        value = tl.reshape(value, (COLS, BLOCK))
    else:
        value = tl.sum(tl.reshape(value, (COLS, BLOCK, GROUP)), axis=2) / GROUP
    return value
