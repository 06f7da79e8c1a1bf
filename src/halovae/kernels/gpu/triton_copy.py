"""Copying rows of channels-last pictures into a larger buffer, written in Triton.

Such a row is one stretch of memory on both sides. torch's copy of a tensor with gaps goes element by element.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

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


@triton.jit
def _copy_rows(
    source, out, height, length, source_frame, source_row, out_frame, out_row, ELEMENTS: tl.constexpr
):  # fmt: skip  # pyright: ignore
    number = tl.program_id(0).to(tl.int64)
    frame, row = number // height, number % height
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(source + frame * source_frame + row * source_row + element, mask=element < length)
    tl.store(out + frame * out_frame + row * out_row + element, value, mask=element < length)
