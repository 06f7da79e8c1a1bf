"""Attention with a head too wide for the vendor's fused kernels: products by the library, the softmax in Triton.

The attention of VAEs has one head of all channels, 384 or more. Libraries have fast fused kernels for up to 256, and
one of an older generation for more. Queries go in pieces, so that the matrix of all pairs never exists.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_SCORE_BYTES = 1 << 28
"""Of the float32 scores of one piece of queries: large enough for products to be at their full speed."""

_ELEMENTS = 4096
"""Of a row of scores, at a time."""


@functools.cache
def has_wide_products() -> bool:
    """Whether torch multiplies in low precision and gives float32: of rounded scores, shares have few digits."""
    return "out_dtype" in (inspect.getdoc(torch.mm) or "")


def run(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query key^T * scale) value in low precision, with scores and shares in float32.

    Args:
        query: `[N, L, D]`.
        key: `[N, S, D]`.
        value: `[N, S, D]`.
        scale: default: one over the root of `D`.
    """
    length, width = query.shape[1:]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = min(length, max(1, _SCORE_BYTES // (4 * key.shape[1])))
    scores = torch.empty(rows, key.shape[1], dtype=torch.float32, device=query.device)
    shares = torch.empty_like(scores, dtype=query.dtype)
    for n in range(len(query)):
        for first, last in _pieces(length, rows):
            wide, narrow = scores[: last - first], shares[: last - first]
            products(query[n, first:last], key[n].T, wide)
            _softmax[(last - first,)](
                wide, narrow, key.shape[1], scale * math.log2(math.e), BLOCK=_ELEMENTS, num_warps=8
            )  # fmt: skip
            torch.mm(narrow, value[n], out=out[n, first:last])
    return out


def products(one: Tensor, other: Tensor, out: Tensor) -> None:
    """The matrix product in float32."""
    torch.mm(one, other, out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]


def _pieces(length: int, rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, rows):
        yield first, min(first + rows, length)


@triton.jit
def _softmax(scores, out, length, scale, BLOCK: tl.constexpr):  # pyright: ignore
    """A row: shares are two to the power of scores times `scale`."""
    row = tl.program_id(0).to(tl.int64) * length
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        score = tl.load(scores + row + place, mask=place < length, other=float("-inf")) * scale
        highest = tl.maximum(largest, score)
        # A place that has met no score yet has nothing to fade.
        fade = tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - highest))
        total = total * fade + tl.where(place < length, tl.exp2(score - highest), 0.0)
        largest = highest
    top = tl.max(largest, axis=0)
    total = tl.sum(total * tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - top)), axis=0)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        score = tl.load(scores + row + place, mask=place < length, other=float("-inf")) * scale
        tl.store(out + row + place, (tl.exp2(score - top) / total).to(out.dtype.element_ty), mask=place < length)
