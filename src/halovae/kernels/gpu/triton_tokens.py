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
        tokens: `[T, C]`, dense.
        other: likewise; None: nothing is added.
        scale: `[C]`; None: 1.
        total: `[T, C]`, any floating dtype; None: not wanted.
        normed: likewise.
        weight: `[C]`; None: 1.
        eps: added to the mean square.
    """
    count, channels = tokens.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // padded)
    _add_and_norm[(triton.cdiv(count, rows),)](
        tokens, other, scale, total, normed, weight, count, eps, C=channels, PADDED=padded, ROWS=rows,
        OTHER=other is not None, SCALE=scale is not None, TOTAL=total is not None, NORMED=normed is not None,
        WEIGHT=weight is not None, num_warps=8 if padded >= 2048 else 4,
    )  # fmt: skip


def gate(tokens: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write `tokens * silu(gates)`, in float32 and rounded once.

    Args:
        tokens: `[T, C]`, dense in C.
        gates: likewise, with the same distance from token to token.
        out: `[T, C]`, dense.
    """
    count, channels = tokens.shape
    block = min(triton.next_power_of_2(channels), _ELEMENTS)
    _gate[(count, triton.cdiv(channels, block))](
        tokens, gates, out, tokens.stride(0), C=channels, BLOCK=block, num_warps=4
    )


@triton.jit
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


@triton.jit
def _gate(x, gates, out, stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < C
    factor = tl.load(gates + row * stride + channel, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + row * stride + channel, mask=live, other=0.0).to(tl.float32)
    value = value * factor / (1.0 + tl.exp(-factor))
    tl.store(out + row * C + channel, value.to(out.dtype.element_ty), mask=live)
