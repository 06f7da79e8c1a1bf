"""Which dtype this processor convolves fastest in: measured, because processors differ by a factor of ten in it."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that are calculated with in float32 where that costs nothing."""


@functools.cache
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to convolve tensors of `dtype` in on the CPU.

    A product of two bfloat16 or float16 numbers is exact in float32, and both ways add in float32; only the rounding of
    the sum is left, once. Processors with matrix units for low precision are many times faster in it; those without can
    be slower than in float32. So both are timed, once in a process, for a few milliseconds.
    """
    if dtype not in LOW:
        return dtype
    return torch.float32 if _seconds(torch.float32) < _seconds(dtype) else dtype


def _seconds(dtype: torch.dtype) -> float:
    with torch.inference_mode(), torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        picture = torch.ones(1, 64, 40, 40, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.ones(64, 64, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        return min(_timed(picture, weight) for _ in range(5))


def _timed(picture: Tensor, weight: Tensor) -> float:
    started = time.perf_counter()
    F.conv2d(picture, weight)
    return time.perf_counter() - started
