"""How long an operator takes on a device, from given rates. `measured_rates.py` tells it from trying it there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from halovae.base.private_torch import schema
from halovae.base.trees import tensors_of
from halovae.kernels.cpu.packed import PACKED_CONVOLUTION

_CPU = torch.device("cpu")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Operation:
    """One call of an operator, with its arguments and result known by shape.

    Args:
        makes: whether the result is new memory; views and writes into an argument are not.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, result: Any, makes: bool) -> None:
        self.func, self.args, self.kwargs, self.result, self.makes = func, args, kwargs, result, makes

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of convolutions, matrix products and attention; the rest doesn't count."""
        count = _formulas().get(self.func.overloadpacket) or _formulas().get(str(self.func))
        return count(*self.args, **self.kwargs, out_val=self.result) if count else 0

    @cached_property
    def made(self) -> int:
        """Bytes of new memory in the result."""
        return sum(map(_size, tensors_of(self.result))) if self.makes else 0

    @cached_property
    def untouched(self) -> int:
        """Bytes of memory that the system hands out when they are first written, since no allocator has so many."""
        return self.made if self.func in _ALLOCATIONS and self.made >= KEPT else 0

    @cached_property
    def bytes(self) -> int:
        """Read and written."""
        if self.func in _ALLOCATIONS:
            return 0
        if not self.makes and not schema(self.func).is_mutable:
            return 0  # a view
        written = sum(map(_size, tensors_of(self.result)))
        return written + sum(map(_size, tensors_of((self.args, self.kwargs))))


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """By operator, or its name: torch's, and the same for operators that torch does not count."""
    from torch.utils.flop_counter import flop_registry  # Late: it loads Triton, which takes 0.3 s.

    convolution = flop_registry[torch.ops.aten.convolution]
    return {
        **flop_registry,
        ATTENTION.overloadpacket: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
        PACKED_CONVOLUTION: lambda *args, out_val: convolution(*args[:6], False, out_val=out_val),
        "halovae.gpu_convolution.default": _gpu_convolution,
    }


def _gpu_convolution(
    pictures: Tensor, packed: Tensor, bias: Any, kernel: list[int], stride: int, before: Any, out: Tensor, *_: Any,
    out_val: None,
) -> int:  # fmt: skip
    return 2 * out.numel() * pictures.shape[1] * prod(kernel)


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
KEPT = 32 * 2**20
"""Bytes up to which an allocator keeps what is freed: glibc's limit. Those of accelerators keep all."""


class Speed(Protocol):
    """What a prediction needs to know of a device."""

    @property
    def device(self) -> torch.device:
        """The device, or one of its type: it decides which kernels there are."""
        ...

    def seconds(self, job: Operation) -> float: ...

    def workspace(self, job: Operation) -> int:
        """Bytes that the operator needs besides its arguments and its result."""
        ...


@dataclass(frozen=True, kw_only=True)
class GivenSpeed:
    """A device known by its rates: an operator takes as long as its arithmetic or its memory traffic does."""

    flops: float
    """Per second, of convolutions and matrix products."""
    bandwidth: float
    """Bytes of memory per second, read and written together."""
    overhead: float = 5e-6
    """Seconds to start an operator."""
    touch: float = 0.0
    """Seconds for each byte of new memory, on top of writing it: the system hands it out when it is first touched."""
    device: torch.device = _CPU
    """One of its type: it decides which kernels there are."""

    def seconds(self, job: Operation) -> float:
        if not job.bytes and self.device.type != "cpu":
            return 0.0  # A view or an allocation is the host's work, which runs ahead of the device.
        return max(job.flops / self.flops, job.bytes / self.bandwidth) + self.overhead + self.touch * job.untouched

    def workspace(self, job: Operation) -> int:
        return 0
