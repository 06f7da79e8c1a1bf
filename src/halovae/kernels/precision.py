"""Which dtype this processor convolves fastest in: measured, because processors differ by a factor of ten in it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from halovae.kernels.trials import Way, gain

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that are calculated with in float32 where that costs nothing."""


def shortens(device: torch.device) -> bool:
    """Whether products of float32 may be taken of factors shortened to 10 bits ("TF32"), as torch lets convolutions."""
    settings = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return device.type == "cuda" and any(settings)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to convolve tensors of `dtype` in on the CPU.

    A product of two bfloat16 or float16 numbers is exact in float32, and both ways add in float32; only the rounding of
    the sum is left, once. Processors with matrix units for low precision are many times faster in it; those without can
    be slower than in float32. So both are timed.
    """
    if dtype not in LOW:
        return dtype

    def ways() -> tuple[Way, Way]:
        return _convolution(torch.float32), _convolution(dtype)

    return dtype if gain(("convolution in", dtype), ways) >= 1 else torch.float32


def _convolution(dtype: torch.dtype) -> Way:
    shapes = (1, 64, 40, 40), (64, 64, 3, 3)
    picture, weight = (torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes)
    return functools.partial(F.conv2d, picture, weight)
