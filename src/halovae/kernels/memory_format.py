"""How a picture lies in memory: channels first, or channels last (next to each other)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halovae.base.private_torch import number_of_storage


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a picture are next to each other in memory. False where there is one channel only."""
    return tensor.ndim in (4, 5) and tensor.shape[1] > 1 and tensor.stride(1) == 1


def is_dense_channels_last(tensor: Tensor) -> bool:
    """Whether a picture lies channels last in memory, all of it, and not channels first as well."""
    last = is_channels_last(tensor) and tensor.is_contiguous(memory_format=memory_format(tensor.ndim, True))
    return last and not tensor.is_contiguous()


def memory_format(ndim: int, channels_last: bool) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats[ndim] if channels_last and ndim in formats else torch.contiguous_format


def memory_of(tensor: Tensor) -> int:
    """What tells the memory of tensors apart: its address, or, of shapes alone, that of what stands for it."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or number_of_storage(storage)


@functools.lru_cache(maxsize=4096)
def strides_of(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense tensor, in elements."""
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    strides, step = [0] * len(shape), 1
    for dim in reversed(list(order)):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)
