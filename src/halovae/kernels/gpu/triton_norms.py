"""Statistics of GroupNorm over channels-last positions, in one pass, written in Triton.

The vendor library's kernel starts one block for each group, thirty-two for a picture, and wants channels first.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_ELEMENTS = 4096
"""Of a tile: enough to keep the memory busy, few enough for the registers."""

_PROGRAMS = 2048
"""Enough to fill a device several times over, so that the last ones to end leave little of it idle."""

_MOST_CHANNELS = 256
"""Of a tile."""


_MERGED = 1024
"""Moments, or channels, that a program takes at a time: one number, since each is another kernel to compile."""


class Division(NamedTuple):
    """How positions are divided over programs."""

    tile: int
    """Channels of a tile."""
    rows: int
    """Positions of a tile."""
    length: int
    """Positions of a part."""
    whole: bool
    """Whether all channels of a tile are of one group."""
    shape: tuple[int, int, int, int]
    """Of the moments: parts, 3, pictures, cells."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def cut(shape: Sequence[int], groups: int) -> Division:
    """For positions of a shape `[N, P, C]`."""
    batch, count, channels = shape
    tile = min(int(triton.next_power_of_2(channels)), _MOST_CHANNELS)
    whole = (channels // groups) % tile == 0
    rows, tiles = _ELEMENTS // tile, _cdiv(channels, tile)
    parts = min(_cdiv(_PROGRAMS, batch * tiles), _cdiv(count, 4 * rows))
    length = _cdiv(_cdiv(count, parts), rows) * rows
    return Division(tile, rows, length, whole, (_cdiv(count, length), 3, batch, tiles if whole else channels))


def moments(positions: Tensor, groups: int, shift: Tensor | None = None) -> Tensor:
    """Count, mean and sum of squared deviations of `[N, P, C]`, for parts of its groups: `[parts, 3, N, cells]`.

    Args:
        positions: dense, any floating dtype up to float32.
        groups: of channels. There are as many cells of each, and a cell has one channel or more.
        shift: `[C]`, in float32, added to each position before.
    """
    batch, count, channels = positions.shape
    tile, rows, length, whole, shape = cut(positions.shape, groups)
    out = torch.empty(shape, dtype=torch.float32, device=positions.device)
    _moments[(shape[0], _cdiv(channels, tile), batch)](
        positions, shift, out, count, length, C=channels, TILE=tile, ROWS=rows, SHIFT=shift is not None, WHOLE=whole,
        num_warps=4,
    )  # fmt: skip
    return out


def merged(parts: Tensor, groups: int) -> Tensor:
    """Moments of whole groups, `[3, N, groups]`, from those of parts as `moments` gives them."""
    count, _, batch, cells = parts.shape
    out = torch.empty(3, batch, groups, dtype=torch.float32, device=parts.device)
    _merge[(batch, groups)](
        parts, out, None, None, count, 0.0, CELLS=cells, EACH=cells // groups, CHANNELS=0, WEIGHT=False, BIAS=False,
        BLOCK=_MERGED, num_warps=4,
    )  # fmt: skip
    return out


def affine(
    parts: Tensor, groups: int, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """The factor and the term of each channel that normalise it, `[2, N, channels]`, from moments of parts."""
    count, _, batch, cells = parts.shape
    out = torch.empty(2, batch, channels, dtype=torch.float32, device=parts.device)
    _merge[(batch, groups)](
        parts, out, weight, bias, count, eps, CELLS=cells, EACH=cells // groups, CHANNELS=channels // groups,
        WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=_MERGED, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("count", "length"))
def _moments(
    x, shift, out, count, length, C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    part, tile, n, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    channel = tile * TILE + tl.arange(0, TILE)
    start = part * length
    stop = tl.minimum(start + length, count)
    source = x + n.to(tl.int64) * count * C + channel
    # Sums of distances to one of the values: their squares don't cancel where the mean is large beside the spread.
    pivot = tl.load(source + start.to(tl.int64) * C, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, TILE), dtype=tl.float32)
    squares = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        live = (row < stop)[:, None] & (channel < C)[None, :]
        value = tl.load(source[None, :] + row[:, None].to(tl.int64) * C, mask=live, other=0.0).to(tl.float32)
        distance = tl.where(live, value - pivot[None, :], 0.0)
        total += distance
        squares += distance * distance
    rows = (stop - start).to(tl.float32)
    sums = tl.sum(total, axis=0)
    mean = pivot + sums / rows
    if SHIFT:
        mean += tl.load(shift + channel, mask=channel < C, other=0.0)
    deviation = tl.maximum(tl.sum(squares, axis=0) - sums * sums / rows, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if WHOLE:
        average = tl.sum(mean, axis=0) / TILE
        apart = mean - average
        together = tl.sum(deviation, axis=0) + rows * tl.sum(apart * apart, axis=0)
        cells = tl.num_programs(1)
        place = out + (part * 3 * batch + n) * cells + tile
        tl.store(place, rows * TILE)
        tl.store(place + batch * cells, average)
        tl.store(place + 2 * batch * cells, together)
    else:
        place = out + (part * 3 * batch + n) * C + channel
        tl.store(place, rows + tl.zeros((TILE,), dtype=tl.float32), mask=channel < C)
        tl.store(place + batch * C, mean, mask=channel < C)
        tl.store(place + 2 * batch * C, deviation, mask=channel < C)


@triton.jit(do_not_specialize=("count",))
def _merge(
    parts, out, weight, bias, count, eps, CELLS: tl.constexpr, EACH: tl.constexpr, CHANNELS: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    n, group, batch, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    plane = batch * CELLS
    source = parts + n * CELLS + group * EACH
    size = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    items = count * EACH
    for first in range(0, items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        place = source + (item // EACH) * 3 * plane + item % EACH
        members = tl.load(place, mask=item < items, other=0.0)
        size += members
        total += members * tl.load(place + plane, mask=item < items, other=0.0)
    everyone = tl.sum(size, axis=0)
    mean = tl.sum(total, axis=0) / everyone
    spread = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        live = item < items
        place = source + (item // EACH) * 3 * plane + item % EACH
        apart = tl.load(place + plane, mask=live, other=0.0) - mean
        spread += tl.where(
            live,
            tl.load(place + 2 * plane, mask=live, other=0.0) + tl.load(place, mask=live, other=0.0) * apart * apart,
            0.0,
        )
    deviation = tl.sum(spread, axis=0)
    if CHANNELS == 0:
        place = out + n * groups + group
        tl.store(place, everyone)
        tl.store(place + batch * groups, mean)
        tl.store(place + 2 * batch * groups, deviation)
    else:
        scale = 1.0 / tl.sqrt(deviation / everyone + eps)
        for first in range(0, CHANNELS, BLOCK):
            inner = first + tl.arange(0, BLOCK)
            channel = group * CHANNELS + inner
            factor = scale + tl.zeros((BLOCK,), dtype=tl.float32)
            term = tl.zeros((BLOCK,), dtype=tl.float32)
            if WEIGHT:
                factor *= tl.load(weight + channel, mask=inner < CHANNELS, other=0.0).to(tl.float32)
            if BIAS:
                term += tl.load(bias + channel, mask=inner < CHANNELS, other=0.0).to(tl.float32)
            place = out + n * groups * CHANNELS + channel
            tl.store(place, factor, mask=inner < CHANNELS)
            tl.store(place + batch * groups * CHANNELS, term - mean * factor, mask=inner < CHANNELS)
