"""Norms, scaled sums and gates of tokens in one pass each, written in Triton."""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_ELEMENTS = 4096
"""Of a tile: enough to keep the memory busy, few enough for the registers."""


def add_and_norm(
    tokens: Tensor,
    *,
    other: Tensor | None = None,
    scale: Tensor | None = None,
    total: Tensor | None = None,
    normed: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write `tokens + other * scale` to `total`, and that divided by its root mean square, times `weight`, to `normed`.

    In float32, each result rounded once. The norm is of the unrounded sum where `total` is None.

    Args:
        tokens: `[..., C]`, dense.
        other: likewise; None: nothing is added.
        scale: `[C]`; None: 1.
        total: as `tokens`, any floating dtype; None: not wanted.
        normed: likewise.
        weight: `[C]`; None: 1.
        eps: added to the mean square.
    """
    channels = tokens.shape[-1]
    count = tokens.numel() // channels
    padded = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // padded)
    _add_and_norm[(triton.cdiv(count, rows),)](
        tokens, other, scale, total, normed, weight, count, eps, C=channels, PADDED=padded, ROWS=rows,
        OTHER=other is not None, SCALE=scale is not None, TOTAL=total is not None, NORMED=normed is not None,
        WEIGHT=weight is not None, num_warps=8 if padded >= 2048 else 4,
    )  # fmt: skip


def rotate(
    tokens: Tensor, out: Tensor, *, cosines: Tensor, sines: Tensor, normed: bool = False, weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """Write tokens turned by a rotary position embedding, in float32 and rounded once.

    The first `R` channels are turned in pairs that lie `R / 2` apart, the others are copied:
    `x[i] * cos[i] - x[i + R/2] * sin[i]` and `x[i + R/2] * cos[i + R/2] + x[i] * sin[i + R/2]`.

    Args:
        tokens: `[N, P, heads, C]`, dense.
        out: likewise, any floating dtype.
        cosines: `[P, R]` or `[N * P, R]`, dense.
        sines: likewise.
        normed: whether tokens are first divided by their root mean square, and rounded to `out`'s dtype.
        weight: `[C]`, of the norm; None: 1.
        eps: added to the mean square.
    """
    channels = tokens.shape[-1]
    count = tokens.numel() // channels
    padded = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // padded)
    _rotate[(triton.cdiv(count, rows),)](
        tokens, out, cosines, sines, weight, count, len(cosines), tokens.shape[2], eps, C=channels, R=cosines.shape[1],
        PADDED=padded, ROWS=rows, NORMED=normed, WEIGHT=weight is not None, num_warps=4,
    )  # fmt: skip


def gate(tokens: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write `tokens * silu(gates)`, in float32 and rounded once.

    Args:
        tokens: `[..., C]`, dense in C, at one distance from each other.
        gates: likewise, with the same distance from token to token.
        out: as `tokens`, dense.
    """
    channels = tokens.shape[-1]
    count = tokens.numel() // channels
    block = min(triton.next_power_of_2(channels), _ELEMENTS)
    _gate[(count, triton.cdiv(channels, block))](
        tokens, gates, out, tokens.stride(-2), C=channels, BLOCK=block, num_warps=4
    )


@triton.jit(do_not_specialize=("count",))
def _add_and_norm(
    x, other, scale, total, normed, weight, count, eps, C: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    OTHER: tl.constexpr, SCALE: tl.constexpr, TOTAL: tl.constexpr, NORMED: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live = (row < count)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if OTHER:
        term = tl.load(other + place, mask=live, other=0.0).to(tl.float32)
        if SCALE:
            term = term * tl.load(scale + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        value = value + term
    if TOTAL:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=live)
        value = rounded.to(tl.float32)
    if NORMED:
        value = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / C + eps))[:, None]
        if WEIGHT:
            value = value * tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + place, value.to(normed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("count", "places", "heads"))
def _rotate(
    x, out, cosines, sines, weight, count, places, heads, eps, C: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, NORMED: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    turns = channel < R
    # Those that are not turned have themselves as partner, and an angle of nothing.
    partner = tl.where(turns, tl.where(channel < R // 2, channel + R // 2, channel - R // 2), channel)
    live = (row < count)[:, None] & (channel < C)[None, :]
    value = tl.load(x + row[:, None] * C + channel[None, :], mask=live, other=0.0).to(tl.float32)
    other = tl.load(x + row[:, None] * C + partner[None, :], mask=live, other=0.0).to(tl.float32)
    if NORMED:
        factor = (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / C + eps))[:, None]
        value = value * factor
        other = other * factor
        if WEIGHT:
            value = value * tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
            other = other * tl.load(weight + partner, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        value = value.to(out.dtype.element_ty).to(tl.float32)
        other = other.to(out.dtype.element_ty).to(tl.float32)
    place = ((row // heads) % places)[:, None] * R + channel[None, :]
    angled = live & turns[None, :]
    cosine = tl.load(cosines + place, mask=angled, other=1.0).to(tl.float32)
    sine = tl.load(sines + place, mask=angled, other=0.0).to(tl.float32)
    sign = tl.where(channel < R // 2, -1.0, 1.0)[None, :]
    value = value * cosine + sign * other * sine
    tl.store(out + row[:, None] * C + channel[None, :], value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _gate(x, gates, out, stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < C
    factor = tl.load(gates + row * stride + channel, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + row * stride + channel, mask=live, other=0.0).to(tl.float32)
    value = value * factor / (1.0 + tl.exp(-factor))
    tl.store(out + row * C + channel, value.to(out.dtype.element_ty), mask=live)
