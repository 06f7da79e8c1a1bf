"""Convolution to 96 channels on Hopper, by patches that serve all taps of a row, written in Gluon.

What holds up `gpu_convolution` there is the cache: it reads each tile once for every tap. Here a patch of 16 x 18
positions is read once for the three taps of a row. It lies column by column, so that the rows of the matrix product for
one tap are those for the tap before, from the next column on. The device's copy engine reads it, with zeros around the
picture.
"""

# Triton reads the types of kernel arguments at run time.
# pyright: reportMissingParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # pyright: ignore[reportMissingImports]

OUTPUTS = 96
_SIDE = 16
"""Rows and columns of a tile of the output."""
_DEPTH = 32
"""Input channels that are added at once."""
_WARPS = 8
_STAGES = 2
"""Steps whose operands are in shared memory. With more, a multiprocessor has room for one block only, and is slower."""


def layouts() -> tuple[gl.NVMMASharedLayout, ...]:
    """How patches and both parts of the weights lie in shared memory."""
    return gl.NVMMASharedLayout(64, 16, 4), gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(64, 16, 2)


def blocks() -> tuple[list[int], ...]:
    """What is read at a time: most columns of a patch and the last two, most output channels and the rest."""
    return [1, _SIDE, _SIDE, _DEPTH], [1, 2, _SIDE, _DEPTH], [_DEPTH, 64], [_DEPTH, 32]


def run(
    frames: Tensor, packed: Tensor, bias: Tensor | None, *, kernel: Sequence[int], before: Sequence[int], out: Tensor,
    upsample: int,
) -> None:  # fmt: skip
    """As `gpu_convolution.convolve` with a stride of one: 96 outputs, a multiple of 32 inputs, 16 bits each."""
    length, height, width, channels = frames.shape
    patch, most, rest = layouts()
    shape, strides = [length, width, height, channels], [height * width * channels, channels, width * channels, 1]
    wide, narrow, first, second = blocks()
    rows, cols = out.shape[1] // upsample, out.shape[2] // upsample
    across, down = triton.cdiv(cols, _SIDE), triton.cdiv(rows, _SIDE)
    _convolve[(out.shape[0] * across * down, upsample * upsample)](
        TensorDescriptor(frames, shape, strides, wide, patch), TensorDescriptor(frames, shape, strides, narrow, patch),
        TensorDescriptor(packed, [packed.numel() // OUTPUTS, OUTPUTS], [OUTPUTS, 1], first, most),
        TensorDescriptor(packed, [packed.numel() // OUTPUTS, OUTPUTS], [OUTPUTS, 1], second, rest),
        bias, out, out.shape[0], rows, cols, across, C=channels, KT=kernel[0], KH=kernel[1], KW=kernel[2],
        TOP=before[0], LEFT=before[1], UP=upsample, BIAS=bias is not None, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=("length", "rows", "cols", "across"))
def _convolve(
    wide, narrow, most, rest, bias, out, length, rows, cols, across, C: gl.constexpr, KT: gl.constexpr,
    KH: gl.constexpr, KW: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr, UP: gl.constexpr, BIAS: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip  # pyright: ignore
    # Tiles of one place follow each other in time: they share most of their frames.
    frame = gl.program_id(0) % length
    tile = gl.program_id(0) // length
    col = tile % across * 16
    row = tile // across * 16
    below, right = gl.program_id(1) // 2, gl.program_id(1) % 2
    top, left = row - TOP, col - LEFT
    if UP == 2:
        top, left = top + below, left + right
    weights = gl.program_id(1) * (KT * KH * KW * C)
    # Of patches, the columns one after the other.
    columns = gl.allocate_shared_memory(wide.dtype, [STAGES * 18, 16, 32], gl.NVMMASharedLayout(64, 16, 2))
    taps = gl.allocate_shared_memory(wide.dtype, [STAGES * KW, 32, 64], gl.NVMMASharedLayout(128, 16, 2))
    more_taps = gl.allocate_shared_memory(wide.dtype, [STAGES * KW, 32, 32], gl.NVMMASharedLayout(64, 16, 2))
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(filled.index(slot), count=1)
    fence_async_shared()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 32, 16])
    STEPS: gl.constexpr = KT * KH * (C // 32)
    for early in gl.static_range(STAGES - 1):
        _fetch(
            early, wide, narrow, most, rest, columns, taps, more_taps, filled, frame, top, left, weights, C, KH, KW,
            STAGES,
        )  # fmt: skip
    acc = warpgroup_mma_init(gl.zeros((256, 64), gl.float32, layout))
    more = warpgroup_mma_init(gl.zeros((256, 32), gl.float32, more_layout))
    for step in range(STEPS):
        stage = step % STAGES
        mbarrier.wait(filled.index(stage), step // STAGES & 1)
        # The products of the step before are done, so that what they have read may be overwritten.
        total, more_total = warpgroup_mma_wait(num_outstanding=0, deps=(acc, more))
        for dx in gl.static_range(KW):
            part = columns.index(stage * 18 + dx)._reinterpret(
                wide.dtype, [256, 32], gl.NVMMASharedLayout(64, 16, 2)
            )  # fmt: skip
            total = warpgroup_mma(part, taps.index(stage * KW + dx), total, is_async=True)
            more_total = warpgroup_mma(part, more_taps.index(stage * KW + dx), more_total, is_async=True)
        acc, more = total, more_total
        ahead = step + STAGES - 1
        if ahead < STEPS:
            _fetch(
                ahead, wide, narrow, most, rest, columns, taps, more_taps, filled, frame, top, left, weights, C, KH,
                KW, STAGES,
            )  # fmt: skip
    total, more_total = warpgroup_mma_wait(num_outstanding=0, deps=(acc, more))
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(filled.index(slot))
    _store(total, bias, out, frame, row, col, below, right, rows, cols, 0, 64, UP, BIAS, layout)
    _store(more_total, bias, out, frame, row, col, below, right, rows, cols, 64, 32, UP, BIAS, more_layout)


@gluon.jit
def _fetch(
    step, wide, narrow, most, rest, columns, taps, more_taps, filled, frame, top, left, weights, C: gl.constexpr,
    KH: gl.constexpr, KW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip  # pyright: ignore
    """Begin to read a patch, and the weights of the taps that it meets."""
    stage = step % STAGES
    line, low = step // (C // 32), step % (C // 32) * 32
    now, down = frame + line // KH, top + line % KH
    bar = filled.index(stage)
    mbarrier.expect(bar, 18 * 16 * 32 * 2 + KW * 32 * 96 * 2)
    layout: gl.constexpr = gl.NVMMASharedLayout(64, 16, 4)
    first = columns.index(stage * 18)._reinterpret(wide.dtype, [1, 16, 16, 32], layout)
    last = columns.index(stage * 18 + 16)._reinterpret(wide.dtype, [1, 2, 16, 32], layout)
    tma.async_copy_global_to_shared(wide, [now, left, down, low], bar, first)
    tma.async_copy_global_to_shared(narrow, [now, left + 16, down, low], bar, last)
    for dx in gl.static_range(KW):
        k = weights + (line * KW + dx) * C + low
        tma.async_copy_global_to_shared(most, [k, 0], bar, taps.index(stage * KW + dx))
        tma.async_copy_global_to_shared(rest, [k, 64], bar, more_taps.index(stage * KW + dx))


@gluon.jit
def _store(
    total, bias, out, frame, row, col, below, right, rows, cols, first: gl.constexpr, N: gl.constexpr,
    UP: gl.constexpr, BIAS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip  # pyright: ignore
    position = gl.arange(0, 256, layout=gl.SliceLayout(1, layout))
    n = first + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    y, x = row + position % 16, col + position // 16
    live = (y < rows) & (x < cols)
    place = ((frame.to(gl.int64) * rows + y) * UP + below) * (cols * UP) + x * UP + right
    if BIAS:
        total = total + gl.load(bias + n).to(gl.float32)[None, :]
    gl.store(out + place[:, None] * 96 + n[None, :], total.to(out.dtype.element_ty), mask=live[:, None])


def fits(frames: Tensor, packed: Tensor, kernel: Sequence[int], stride: int, out: Tensor) -> bool:
    """Whether `run` takes this convolution, and the device is one that it is for."""
    low = frames.dtype in (torch.bfloat16, torch.float16) and frames.dtype == out.dtype
    shapes = out.shape[-1] == packed.shape[-1] == OUTPUTS and frames.shape[-1] % _DEPTH == 0 and kernel[-1] in (2, 3)
    if not (low and shapes and stride == 1 and frames.is_contiguous() and frames.data_ptr() % 16 == 0):
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(frames.device) == (9, 0)
