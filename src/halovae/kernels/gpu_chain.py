"""Bias, sum, norm over channels, scale and activation of channels-last positions in one pass, written in Triton."""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

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
    times: Tensor | float | None = None,
    plus: Tensor | float | None = None,
    silu: bool = False,
) -> None:
    """Write `activation(normalized(positions + shift + other) * times + plus)`, in float32 and rounded once.

    Args:
        positions: `[P, C]`, dense.
        out: likewise, any floating dtype.
        shift: `[C]` in float32, or a number, or None.
        other: as `positions`, or None.
        normalize: least length to divide by; None: no norm.
        times: as `shift`.
        plus: as `shift`.
        silu: whether x * sigmoid(x) follows.
    """
    count, channels = positions.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // padded)
    _chain[(triton.cdiv(count, rows),)](
        positions, out, shift, other, times, plus, count, normalize or 0.0, C=channels, PADDED=padded, ROWS=rows,
        SHIFT=_kind(shift), OTHER=other is not None, NORM=normalize is not None, FACTOR=_kind(times),
        TERM=_kind(plus), SILU=silu, num_warps=4,
    )  # fmt: skip


def _kind(parameter: Tensor | float | None) -> int:
    """0: none, 1: a number, 2: one for each channel."""
    return 0 if parameter is None else 1 + isinstance(parameter, Tensor)


@triton.jit
def _chain(
    x, out, shift, other, factor, term, count, eps, C: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    SHIFT: tl.constexpr, OTHER: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr, TERM: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip  # pyright: ignore
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live = (row < count)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if SHIFT:
        # Where nothing is live, nothing is to be normalized.
        value = tl.where(live, value + _parameter(shift, channel, C, SHIFT), 0.0)
    if OTHER:
        value = value + tl.load(other + place, mask=live, other=0.0).to(tl.float32)
    if NORM:
        value = value / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), eps)[:, None]
    if FACTOR:
        value = value * _parameter(factor, channel, C, FACTOR)
    if TERM:
        value = value + _parameter(term, channel, C, TERM)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _parameter(parameter, channel, C: tl.constexpr, KIND: tl.constexpr):
    """A number, or one for each channel."""
    if KIND == 1:
        return parameter
    return tl.load(parameter + channel, mask=channel < C, other=0.0)[None, :]
