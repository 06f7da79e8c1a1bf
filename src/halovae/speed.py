"""How long an operator takes on a device: from given rates, or from trying it there at a small size."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from halovae.dataflow import Spec, key_of, mapped, tensors_of, to_meta
from halovae.kernels.packed import PACKED_CONVOLUTION, Geometry
from halovae.memory import allocated_by, is_shortage

LOG = logging.getLogger("halovae")
_CPU = torch.device("cpu")
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Job:
    """One call of an operator, with its arguments and result known by shape.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: likewise.
        result: what it returns.
        makes: whether the result is new memory; views and writes into an argument are not.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, result: Any, makes: bool) -> None:
        self.func, self.args, self.kwargs, self.result, self.makes = func, args, kwargs, result, makes

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of convolutions, matrix products and attention; the rest doesn't count."""
        count = _FLOPS.get(self.func) or _FLOPS.get(str(self.func))
        return count(self.args, self.result) if count else 0

    @cached_property
    def made(self) -> int:
        """Bytes of new memory in the result."""
        return sum(map(_size, tensors_of(self.result))) if self.makes else 0

    @cached_property
    def untouched(self) -> int:
        """Bytes of memory that the system hands out when they are first written, since no allocator has so many."""
        return self.made if self.func in _ALLOCATIONS and self.made >= _KEPT else 0

    @cached_property
    def bytes(self) -> int:
        """Read and written."""
        if self.func in _ALLOCATIONS:
            return 0
        if not self.makes and not self.func._schema.is_mutable:
            return 0  # a view
        written = sum(map(_size, tensors_of(self.result)))
        return written + sum(map(_size, tensors_of((self.args, self.kwargs))))


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _convolution(args: Any, result: Tensor) -> int:
    weight, transposed = args[1], args[6]
    each = args[0] if transposed else result
    return 2 * each.shape[0] * prod(each.shape[2:]) * prod(weight.shape)


def _product(first: int) -> Callable[[Any, Tensor], int]:
    """Of the matrices at `first` and after it."""
    return lambda args, result: 2 * prod(args[first].shape) * args[first + 1].shape[-1]


def _attention(args: Any, result: Any) -> int:
    query, key, value = args[:3]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _packed_convolution(args: Any, result: Tensor) -> int:
    return 2 * result.shape[0] * prod(result.shape[2:]) * prod(args[1].shape)


_FLOPS: dict[Any, Callable[[Any, Any], int]] = {
    PACKED_CONVOLUTION: _packed_convolution,
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.mm.default: _product(0),
    torch.ops.aten.bmm.default: _product(0),
    torch.ops.aten.addmm.default: _product(1),
    torch.ops.aten.baddbmm.default: _product(1),
    _ATTENTION: _attention,
}

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_KEPT = 32 * 2**20
"""Bytes up to which an allocator keeps what is freed: glibc's limit. Those of accelerators keep all."""


class Speed(Protocol):
    """What a prediction needs to know of a device."""

    @property
    def device(self) -> torch.device:
        """The device, or one of its type: it decides which kernels there are."""
        ...

    def seconds(self, job: Job) -> float: ...

    def workspace(self, job: Job) -> int:
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

    def seconds(self, job: Job) -> float:
        return max(job.flops / self.flops, job.bytes / self.bandwidth) + self.overhead + self.touch * job.untouched

    def workspace(self, job: Job) -> int:
        return 0


_ROWS, _COLUMNS = 256, (128, 64, 32, 16)
"""Rows of a trial at most, and columns: as many as the limits below allow. Rows are many because libraries choose
their algorithms by sizes that leave the columns out."""
_TRIAL_BYTES, _TRIAL_FLOPS = 64 * 2**20, 4e9
"""A call that is larger than that, even with few columns, is not tried: the device's rates tell its time."""
_ROUNDS = 3


class MeasuredSpeed:
    """A device known by trials: each kind of operator runs on it, on random numbers and few columns.

    Args:
        device: that runs the trials.
        dtype: of most of what the network computes with.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._known: dict[Any, Any] = {}
        self.rates = rates_of(device, dtype)

    def seconds(self, job: Job) -> float:
        if not job.bytes:
            return self.rates.seconds(job)
        small = _cropped(job, *_COLUMNS)
        if small is None:
            return self.rates.seconds(job)
        share = job.flops / small.flops if small.flops else job.bytes / small.bytes
        return share * self._tried(small, _least_seconds, self.rates.seconds(small))

    def workspace(self, job: Job) -> int:
        """Of trials with two numbers of columns, continued in a straight line."""
        if not job.bytes:
            return 0
        small, less = _cropped(job, *_COLUMNS), _cropped(job, _COLUMNS[-1])
        if small is None or less is None:
            return 0
        more = self._tried(small, allocated_by, small.made) - small.made
        if small.made == less.made:
            return more
        growth = (more - self._tried(less, allocated_by, less.made) + less.made) / (small.made - less.made)
        return max(0, more + round(growth * (job.made - small.made)))

    def _tried(self, job: Job, measure: Callable[[Callable[[], Any], torch.device], Any], otherwise: Any) -> Any:
        """What is measured of a job, once; `otherwise` where an operator wants more of its arguments than a shape."""
        key = measure, job.func, key_of(job.args), key_of(job.kwargs)
        if key not in self._known:
            args, kwargs = self._arguments(job)
            try:
                self._known[key] = measure(lambda: job.func(*args, **kwargs), self.device)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:  # How operators refuse values.
                if is_shortage(error):
                    raise
                LOG.debug("no trial of %s, rates tell its time: %s", job.func, error)
                self._known[key] = otherwise
        return self._known[key]

    def _arguments(self, job: Job) -> tuple[Any, Any]:
        """Real ones of these shapes, with a packed weight where the operator takes one."""
        args, kwargs = (mapped(self._real, value) for value in (job.args, job.kwargs))
        if str(job.func) == PACKED_CONVOLUTION:
            picture, weight, bias, padding, stride, dilation, *rest = args
            weight = Geometry(weight.shape, weight.dtype, picture.shape, stride, padding, dilation).pack(weight)
            args = picture, weight, bias, padding, stride, dilation, *rest
        return args, kwargs

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return self.device
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = Spec(leaf).empty(self.device)
        return tensor.normal_() if tensor.is_floating_point() else tensor.zero_()


def rates_of(device: torch.device, dtype: torch.dtype) -> GivenSpeed:
    """Measure a device in a fraction of a second: a matrix product, a copy, and an operator on next to nothing."""
    matrix = torch.randn(1024, 1024, device=device).to(dtype)
    source = torch.zeros(8 * 2**20, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)
    product = _least_seconds(lambda: matrix @ matrix, device)
    copy = _least_seconds(lambda: target.copy_(source), device)
    start = _least_seconds(lambda: one.add_(1), device)
    return GivenSpeed(
        flops=2 * 1024**3 / product, bandwidth=2 * source.nbytes / copy, overhead=start, touch=_touch(device)
    )


def _touch(device: torch.device) -> float:
    """Seconds for each byte of memory that the system hands out; none where the allocator keeps all of it."""
    if device.type != "cpu":
        return 0.0
    many = torch.zeros(4 * _KEPT, dtype=torch.uint8)  # more than is free in a piece
    new, again = (_least_seconds(call, device) for call in (lambda: torch.empty_like(many).zero_(), many.zero_))
    return max(0.0, new - again) / many.nbytes


def _least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    seconds: list[float] = []
    with torch.no_grad():
        call()  # libraries prepare themselves
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - started)
    return min(seconds)  # other work on the machine only adds


def _cropped(job: Job, *columns: int) -> Job | None:
    """The same call on fewer columns, or None where that can't be made or is still too much."""
    for count in columns:
        try:
            small = _with_columns(job, count)
        except Exception:  # The rows and columns stand in other arguments too.
            return None
        if small.bytes <= _TRIAL_BYTES and small.flops <= _TRIAL_FLOPS:
            return small
    return None


def _with_columns(job: Job, columns: int) -> Job:
    def crop(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        spec = Spec(leaf)
        if 0 not in leaf.stride():
            # Also that of a part of a picture: copying from one order to another takes longest.
            spec.order = tuple(sorted(range(leaf.ndim), key=lambda dim: -leaf.stride(dim)))
        if leaf.ndim >= 4:
            spec.shape = *leaf.shape[:-2], min(leaf.shape[-2], _ROWS), min(leaf.shape[-1], columns)
        return spec.empty("meta")

    args, kwargs = mapped(crop, job.args), mapped(crop, job.kwargs)
    return Job(job.func, args, kwargs, job.func(*args, **mapped(to_meta, kwargs)), job.makes)
