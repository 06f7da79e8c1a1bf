"""A run on shapes alone that keeps a clock, counts floating-point operations and follows memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from halovae.comm import Message, Pending, SoloComm
from halovae.dataflow import Shapes, key_of, meets_meta, tensors_of
from halovae.kernels.autocast import Autocast
from halovae.kernels.deferred import Deferred, computed
from halovae.kernels.kept import apart
from halovae.kernels.shapes import standing_in
from halovae.link_speed import LinkSpeed
from halovae.speed import Job, Speed


class Costs:
    """What operators return and take, by the shapes of their arguments. Runs for one device share it.

    Args:
        speed: of the device.
    """

    def __init__(self, speed: Speed) -> None:
        self.device = speed.device
        self.shapes = Shapes({})
        self._speed = speed
        self._known: dict[Any, tuple[float, int, int]] = {}

    def of(self, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[float, int, int]:
        """Seconds, floating-point operations, and bytes beside arguments and result, of one call of an operator."""
        key = func, key_of(args), key_of(kwargs)
        if key not in self._known:
            job = Job(func, args, kwargs, result, self.shapes.makes(func))
            self._known[key] = self._speed.seconds(job), job.flops, self._speed.workspace(job)
        return self._known[key]


class Meter(TorchDispatchMode):
    """Within it, what meets a tensor of the meta device runs there, and takes time and memory on paper.

    Args:
        costs: of operators on the device that the run is predicted for.

    Attributes:
        seconds: the clock.
        exposed: seconds of it in which messages were waited for.
        flops: floating-point operations so far; a multiplication and an addition are two.
        live: bytes of the tensors that exist now and did not before.
        peak: most of them at any time.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.seconds = self.exposed = 0.0
        self.flops = self.live = self.peak = 0
        self._costs = costs
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Deferred in types:
            with self:  # What waits is computed, and that takes time as well.
                args, kwargs = computed(args), computed(kwargs)
        if not meets_meta(args, kwargs):
            return func(*args, **kwargs)
        result = self._costs.shapes.run(func, args, kwargs)
        if _is_constant(func, args, result):
            # Real, wherever it was asked for: code may look at the values of what doesn't depend on the picture.
            return func(*args, **{**kwargs, "device": "cpu"})
        if self._costs.shapes.makes(func):
            for tensor in tensors_of(result):
                self._follow(tensor)
        seconds, flops, workspace = self._costs.of(func, args, kwargs, result)
        self.seconds += self._stand_in.turns * seconds
        self.flops += self._stand_in.turns * flops
        self.peak = max(self.peak, self.live + workspace)
        return result

    def _follow(self, tensor: Tensor) -> None:
        """Count a new tensor's memory until the last tensor that shares it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size

    def wait_until(self, moment: float) -> None:
        """Let the clock stand at `moment` at least: what is missing is waiting."""
        waiting = max(0.0, moment - self.seconds)
        self.seconds += waiting
        self.exposed += waiting

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs within it."""
        with apart(), standing_in(self._costs.device) as self._stand_in, _FusedAttention(), Autocast(), self:
            yield


_CONSTANT = 2**16
"""Elements of a constant at the most; larger ones are work."""


def _is_constant(func: Any, args: Any, result: Any) -> bool:
    """Whether a small tensor of known values is made, or moved to the device: a table of positions, a mask."""
    name = str(func.overloadpacket)
    return (
        isinstance(result, Tensor)
        and result.numel() <= _CONSTANT
        and not name.startswith("aten.empty")
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not any(tensor.is_meta for tensor in tensors_of(args))
    )


class _FusedAttention(TorchFunctionMode):
    """Attention as one operator, as devices run it; the meta device would build the matrix of all pairs."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not query.is_meta or query.shape[:-2] != key.shape[:-2]:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    flat = [tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (query, key, value)]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*flat)[0]
    return fused.reshape(*query.shape[:-1], value.shape[-1])


class MeteredComm(SoloComm):
    """Stands for one rank of a group whose other ranks run alongside: messages take time on the meter's clock.

    Args:
        rank: of the group.
        size: of the group.
        link: how fast messages are.
        meter: whose clock it is.
    """

    def __init__(self, rank: int, size: int, link: LinkSpeed, meter: Meter) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._link, self._meter = link, meter
        self._free = 0.0

    def post(self, sends: Sequence[Message], receives: Sequence[Message], bulk: bool = False) -> Pending:
        sent, received = (sum(tensor.nbytes for _, tensor in messages) for messages in (sends, receives))
        self.traffic.messages += len(sends)
        self.traffic.bytes += sent
        if sends or receives:
            # One after the other: they share the link.
            start = max(self._free, self._meter.seconds)
            self._free = start + self._link.seconds(max(sent, received))
        return _Arrival(self._meter, self._free)

    def all_gather_object(self, value: Any) -> list[Any]:
        self._meter.wait_until(self._meter.seconds + 2 * self._link.latency)
        return [value] * self.size


class _Arrival:
    def __init__(self, meter: Meter, moment: float) -> None:
        self._meter, self._moment = meter, moment

    def wait(self) -> None:
        self._meter.wait_until(self._moment)
