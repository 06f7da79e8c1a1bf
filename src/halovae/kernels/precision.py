"""Which dtype a device computes in."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

from halovae.base import verdicts
from halovae.base.private_torch import without_functions, without_modes
from halovae.kernels.autocast import off

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that are calculated with in float32 where that costs nothing."""


def shortens(device: torch.device) -> bool:
    """Whether products of float32 may be taken of factors shortened to 10 bits ("TF32"), as torch lets convolutions."""
    settings = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return device.type == "cuda" and any(settings)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to convolve tensors of `dtype` in on the CPU.

    A product of two bfloat16 or float16 numbers is exact in float32, and both ways add in float32; only the rounding of
    the sum is left, once. Processors differ by a factor of ten in how fast low precision is, also those that have
    instructions for it. So it is tried.
    """
    return torch.float32 if dtype in LOW and not _is_faster(dtype) else dtype


@functools.cache
def _is_faster(dtype: torch.dtype) -> bool:
    """Whether this processor convolves faster in `dtype` than in float32; timed once on a machine, without modes."""
    name = verdicts.name_of(torch.device("cpu"), "convolves faster in", dtype)
    found = verdicts.read(name)
    if not isinstance(found, bool):
        with without_modes(), off(), torch.inference_mode(), without_functions():
            found = _seconds(dtype) < _seconds(torch.float32)
        verdicts.write(name, found)
    return found


def _seconds(dtype: torch.dtype) -> float:
    """Of a convolution: the least of five, in processor time, which other work disturbs less than the clock."""
    shapes = (1, 64, 40, 40), (64, 64, 3, 3)
    picture, weight = (torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes)
    times: list[float] = []
    for _ in range(5):
        started = time.thread_time()
        F.conv2d(picture, weight)
        times.append(time.thread_time() - started)
    return min(times)
