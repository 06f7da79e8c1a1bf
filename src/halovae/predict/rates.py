"""How long an operator takes on a device, from given rates. `measured_rates.py` tells it from trying it there."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.memory import allocated_by, free_bytes, is_shortage
from halovae.base.private_torch import schema
from halovae.base.trees import mapped, tensors_of
from halovae.calls.dataflow import Spec, key_of, to_meta
from halovae.calls.randomness import frozen_generators
from halovae.kernels.cpu.packed import PACKED_CONVOLUTION, Geometry

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


# ---- rates and times from trying a device ----------------------------------------------------------------------------


LOG = logging.getLogger("halovae")
_ROUNDS = 3
"""Calls of a trial on an accelerator."""
_MOST_ROUNDS = 8
"""Calls of a trial on a CPU, where the two quickest have to agree."""
_ALIKE = 1.15
"""How far these may be apart."""
_TURNS = 5
"""Calls in a row in a round on an accelerator."""
_HEAD_START = 4096
"""Rows and columns of a matrix product in float32 that gives the host time to ask for these calls."""


@dataclass(frozen=True)
class _Size:
    """How large a trial is at the most. A call that is larger, even with few columns, is told by the device's rates."""

    rows: int
    columns: tuple[int, ...]
    """Tried one after the other, until the rest is small enough."""
    bytes: int
    flops: float = 0.0
    enough: float = math.inf
    """Floating-point operations beyond which fewer columns do."""
    frames: int | None = None
    """Pictures in the first dimension, and in the last but two of a video; None: all."""
    rounded: frozenset[int] = frozenset()
    """Dimensions of which larger sizes are rounded down to powers of two: shards of about one size share trials."""


_COLUMNS = 128, 64, 32, 16
_ON_CPU = _Size(rows=256, columns=_COLUMNS, bytes=64 * 2**20, flops=4e9, enough=5e8, rounded=frozenset((-1,)))
"""Rows are many because libraries choose their algorithms by sizes that leave the columns out."""
_PLAIN = _Size(rows=128, columns=_COLUMNS, bytes=8 * 2**20, frames=2, rounded=frozenset((-2, -1)))
"""What has no arithmetic to speak of has no such choice."""
_TINY = replace(_PLAIN, rows=16, columns=(32, 16))
"""For what that allocates besides its result, which is the same at every size."""
_ON_ACCELERATOR = _Size(rows=8192, columns=(8192, 512, 256, 128, 64), bytes=4 * 2**30, flops=2e13)
"""Whole pictures, since a part of one does not fill it."""
_SHARE = 4
"""Of what is free on an accelerator, a trial takes so many times less at the most."""


@dataclass(frozen=True)
class _Trial:
    seconds: float
    steady: bool
    """Whether the quickest calls took about as long."""
    allocated: int
    """Bytes, the result included."""


class MeasuredSpeed:
    """A device known by trials: each kind of operator runs on it, on random numbers.

    Args:
        dtype: of most of what the network computes with.

    Attributes:
        rates: of the device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._known: dict[Any, _Trial] = {}
        self._size = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
        if device.type != "cpu" and (free := free_bytes(device)) is not None:
            self._size = replace(_ON_ACCELERATOR, bytes=min(_ON_ACCELERATOR.bytes, free // _SHARE))
        self.rates = rates_of(device, dtype)

    def seconds(self, job: Operation) -> float:
        if not job.bytes:
            return self.rates.seconds(job)
        size = self._size if job.flops or self.device.type != "cpu" else _PLAIN
        small = self._cropped(job, size, size.columns)
        if small is None:
            return self.rates.seconds(job)
        share = job.flops / small.flops if small.flops else job.bytes / small.bytes
        # Memory that the system hands out anew each time is not in a trial that takes less than the allocator keeps.
        new = self.rates.touch * job.made if job.made >= KEPT > small.made else 0.0
        return share * self._tried(small).seconds + new

    def workspace(self, job: Operation) -> int:
        """Of trials with two numbers of columns, continued in a straight line."""
        if not job.bytes:
            return 0
        size, on_cpu = self._size if job.flops or self.device.type != "cpu" else _TINY, self.device.type == "cpu"
        small = self._cropped(job, size, size.columns[-2:-1] if on_cpu else size.columns)
        less = self._cropped(job, size, size.columns[-1:])
        if small is None or less is None:
            return 0
        more = self._tried(small, timed=not on_cpu).allocated - small.made
        if small.made in (less.made, job.made):
            return max(0, more)
        growth = (more - self._tried(less, timed=False).allocated + less.made) / (small.made - less.made)
        return max(0, more + round(growth * (job.made - small.made)))

    def _tried(self, job: Operation, timed: bool = True) -> _Trial:
        """What is measured of a job, once; rates tell where an operator wants more of its arguments than a shape."""
        key = timed, job.func, key_of(job.args), key_of(job.kwargs)
        if key not in self._known:
            func = _attend if job.func is ATTENTION and self.device.type != "cpu" else job.func
            try:
                with frozen_generators(self.device):
                    args, kwargs = self._arguments(job)
                    self._known[key] = _trial(lambda: func(*args, **kwargs), self.device, timed)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:  # How operators refuse values.
                if is_shortage(error) and self.device.type == "cpu":
                    raise
                LOG.debug("no trial of %s, rates tell its time: %s", job.func, error)
                self._known[key] = _Trial(self.rates.seconds(job), True, job.made)
        return self._known[key]

    @property
    def unsteady(self) -> float:
        """The share of trials of which no two calls took about as long: the machine did something else all the time."""
        timed = [trial for (timed, *_), trial in self._known.items() if timed]
        return sum(not trial.steady for trial in timed) / max(1, len(timed))

    def _arguments(self, job: Operation) -> tuple[Any, Any]:
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

    def _cropped(self, job: Operation, size: _Size, columns: tuple[int, ...]) -> Operation | None:
        """The same call on fewer columns, or None where that can't be made or is still too much."""
        for count in columns:
            try:
                small = _with_size(job, size, count)
            except Exception:  # The rows and columns stand in other arguments too.
                return None
            enough = small.flops <= size.enough or count == columns[-1]
            if enough and small.bytes <= size.bytes and small.flops <= size.flops:
                return small
        return None


def rates_of(device: torch.device, dtype: torch.dtype) -> GivenSpeed:
    """Measure a device in a fraction of a second: a matrix product, a copy, and an operator on next to nothing."""
    side, count = (1024, 8 * 2**20) if device.type == "cpu" else (4096, 64 * 2**20)
    with frozen_generators(device):
        matrix = torch.randn(side, side, device=device).to(dtype)
    source = torch.zeros(count, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)
    product = _quickest(lambda: matrix @ matrix, device)[0]
    copy = _quickest(lambda: target.copy_(source), device)[0]
    start = _quickest(lambda: one.add_(1), device)[0]
    return GivenSpeed(
        flops=2 * side**3 / product, bandwidth=2 * source.nbytes / copy, overhead=start, touch=_touch(device),
        device=device,
    )  # fmt: skip


def _touch(device: torch.device) -> float:
    """Seconds for each byte of memory that the system hands out; none where the allocator keeps all of it."""
    if device.type != "cpu":
        return 0.0
    many = torch.zeros(4 * KEPT, dtype=torch.uint8, device=device)  # more than is free in a piece
    new, again = (_quickest(call, device)[0] for call in (lambda: torch.empty_like(many).zero_(), many.zero_))
    return max(0.0, new - again) / many.nbytes


def _trial(call: Callable[[], Any], device: torch.device, timed: bool) -> _Trial:
    with torch.no_grad():
        allocated = allocated_by(call, device)
        return _Trial(*_quickest(call, device), allocated) if timed else _Trial(math.nan, True, allocated)


def _quickest(call: Callable[[], Any], device: torch.device) -> tuple[float, bool]:
    """Seconds of the quickest of several calls, since other work only adds, and whether it can be relied on."""
    with torch.no_grad():
        if device.type != "cpu":
            call()  # libraries prepare themselves
            return min(_device_seconds(call, device) for _ in range(_ROUNDS)), True
        times: list[float] = []
        while len(times) < _MOST_ROUNDS:
            times = sorted([*times, _seconds(call)])
            # The first call may prepare a library, and any may be disturbed: two that agree were not.
            if len(times) > 1 and times[1] <= _ALIKE * times[0]:
                return times[0], True
        return times[0], False


def _seconds(call: Callable[[], Any]) -> float:
    """With one thread in its own processor time, in which it does not wait for other work on the machine."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def _device_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """By an accelerator's own clock: what the host takes to ask is not in it, as in a network where it runs ahead."""
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    work = torch.ones(_HEAD_START, _HEAD_START, device=device)
    torch.mm(work, work)  # meanwhile the host asks for the calls
    stream = torch.accelerator.current_stream(device)
    start.record(stream)
    for _ in range(_TURNS):
        call()
    end.record(stream)
    torch.accelerator.synchronize(device)
    return start.elapsed_time(end) / _TURNS / 1000


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """What stands for attention on shapes alone is an operator of CPUs."""
    return F.scaled_dot_product_attention(query, key, value)


def _with_size(job: Operation, size: _Size, columns: int) -> Operation:
    most = {-2: size.rows, -1: columns}

    def least(leaf: Tensor, dim: int) -> int:
        length = leaf.shape[dim]
        if dim in size.rounded and length > size.columns[-1]:
            length = 1 << (length.bit_length() - 1)
        return min(length, most.get(dim, length))

    def crop(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        spec = Spec(leaf)
        if 0 not in leaf.stride():
            # Also that of a part of a picture: copying from one order to another takes longest.
            spec.order = tuple(sorted(range(leaf.ndim), key=lambda dim: -leaf.stride(dim)))
        if leaf.ndim >= 4:
            shape = [*leaf.shape[:-2], least(leaf, -2), least(leaf, -1)]
            for dim in () if size.frames is None else (0, -3)[: leaf.ndim - 3]:
                shape[dim] = min(shape[dim], size.frames or 0)
            spec.shape = tuple(shape)
        return spec.empty("meta")

    args, kwargs = mapped(crop, job.args), mapped(crop, job.kwargs)
    return Operation(job.func, args, kwargs, job.func(*args, **mapped(to_meta, kwargs)), job.makes)
