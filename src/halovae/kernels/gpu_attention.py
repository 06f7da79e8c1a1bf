"""Attention with one head too wide for the vendor's kernels, without a matrix of all pairs, written in Triton.

The attention of VAEs has one head of all channels, 512 or so. Libraries have fast kernels for up to 256, and one of an
older generation for more. Dao et al., "FlashAttention" (2022), have the method: softmax in float32, block by block.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

WIDTHS = (512,)
"""Channels of a head for which the tiles fit into the registers."""

QUERIES, KEYS, WARPS, STAGES = 64, 64, 8, 1
"""Of a tile. More queries don't fit into the registers beside their results."""


def fits(*tensors: Tensor) -> bool:
    """Whether `[N, L, D]` can be read by the device's copy engine: aligned, channels next to each other."""
    return all(
        tensor.dtype in (torch.bfloat16, torch.float16)
        and tensor.shape[-1] in WIDTHS
        and tensor.stride(2) == 1
        and all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:2])
        and tensor.storage_offset() * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


def run(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query key^T * scale) value, of `[N, L, D]`, `[N, S, D]` and `[N, S, D]`; all as `fits` says.

    Args:
        query: of one head.
        key: likewise.
        value: likewise.
        scale: default: one over the root of `D`.
    """
    batch, length, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.empty(batch, length, width, dtype=query.dtype, device=query.device)
    tiles = [_tiles(tensor, rows) for tensor, rows in ((query, QUERIES), (key, KEYS), (value, KEYS), (out, QUERIES))]
    _attend[(triton.cdiv(length, QUERIES), batch)](
        *tiles, key.shape[1], scale * math.log2(math.e), D=width, QUERIES=QUERIES, KEYS=KEYS, num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    return out


def _tiles(tensor: Tensor, rows: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, rows, tensor.shape[2]])


@triton.jit
def _attend(
    query, key, value, out, keys, scale, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip  # pyright: ignore
    start, batch = tl.program_id(0) * QUERIES, tl.program_id(1)
    queries = query.load([batch, start, 0]).reshape(QUERIES, D)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    found = tl.zeros((QUERIES, D), dtype=tl.float32)
    for first in range(0, keys, KEYS):
        scores = tl.dot(queries, key.load([batch, first, 0]).reshape(KEYS, D).T)
        other = first + tl.arange(0, KEYS)
        scores = tl.where((other < keys)[None, :], scores * scale, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        shares = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(largest - highest)
        total = total * fade + tl.sum(shares, axis=1)
        # Beyond the last key the copy engine gives zeros.
        values = value.load([batch, first, 0]).reshape(KEYS, D)
        found = tl.dot(shares.to(values.dtype), values, found * fade[:, None])
        largest = highest
    found = (found / total[:, None]).to(queries.dtype)
    out.store([batch, start, 0], found.reshape(1, QUERIES, D))
