"""Which dtype this processor convolves fastest in: measured, because processors differ by a factor of ten in it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

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
    with undisturbed():
        last = torch.channels_last
        tensors = [
            [torch.ones(shape, dtype=each).to(memory_format=last) for shape in ((1, 64, 40, 40), (64, 64, 3, 3))]
            for each in (torch.float32, dtype)
        ]
        wide, low = seconds([functools.partial(F.conv2d, *pair) for pair in tensors])
    return torch.float32 if wide < low else dtype


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, torch runs without the modes around: they take time, and a trial's answer is kept for other calls."""
    with _disable_current_modes(), torch.inference_mode(), torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        yield


def seconds(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The least of five runs of each, in turns; in processor time, which other work disturbs less than the clock."""
    turns = [[_timed(way) for way in ways] for _ in range(5)]
    return [min(times) for times in zip(*turns, strict=True)]


def _timed(way: Callable[[], object]) -> float:
    started = time.thread_time()
    way()
    return time.thread_time() - started
