"""A run on shapes alone that keeps a clock, counts floating-point operations and follows memory."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.private_torch import number_of_storage, schema, without_functions
from halovae.base.trees import tensors_of
from halovae.calls.dataflow import OnShapes, Shapes, fresh, has_meta, key_of, meets_meta
from halovae.comm import Message, Pending, SoloComm
from halovae.comm.bandwidth import LinkSpeed
from halovae.kernels import autocast
from halovae.kernels.kept import apart
from halovae.kernels.lazy.deferred import Deferred, computed
from halovae.kernels.shapes_only import standing_in
from halovae.predict.rates import Operation, Speed

Cost = tuple[float, int, int]
"""Seconds, floating-point operations, and bytes beside arguments and result."""


class Costs:
    """What operators return and take, by the shapes of their arguments. Runs for one device share it."""

    def __init__(self, speed: Speed) -> None:
        self.device = speed.device
        self._speed = speed
        self.shapes = Shapes()
        self._known: dict[Any, tuple[Any, Cost]] = {}
        self._views: dict[Any, Cost] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Cost]:
        """An operator's result on the meta device, and what one call of it costs."""
        makes = self.shapes.makes(func)
        if not makes and not schema(func).is_mutable:
            return self._view(func, args, kwargs)
        key = func, key_of(args), key_of(kwargs) if kwargs else ()
        known = self._known.get(key)
        if known is None:
            result = self.shapes.run(func, args, kwargs)
            cost = self._of(Operation(func, args, kwargs, result, makes))
            # What writes into an argument is not run again, unless that has another shape then.
            same = (key_of(args), key_of(kwargs) if kwargs else ()) == key[1:]
            self._known[key] = (result if makes else _place_of(result, args, kwargs) if same else None), cost
            return (fresh(result) if makes else result), cost
        found, cost = known
        if makes:
            return fresh(found), cost
        if found is None:
            return self.shapes.run(func, args, kwargs), cost
        return (args if isinstance(found, int) else kwargs)[found], cost

    def _view(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Cost]:
        """Views of one kind all cost the same: the call."""
        result = self.shapes.run(func, args, kwargs)
        if func not in self._views:
            self._views[func] = self._of(Operation(func, args, kwargs, result, makes=False))
        return result, self._views[func]

    def _of(self, job: Operation) -> Cost:
        return self._speed.seconds(job), job.flops, self._speed.workspace(job)


def _place_of(result: Any, args: Any, kwargs: Any) -> int | str | None:
    """Which argument an operator returns."""
    return next((place for place, value in (*enumerate(args), *kwargs.items()) if value is result), None)


@dataclass
class Reading:
    """What a part of a run costs."""

    counts: tuple[float, ...] = ()
    """Seconds, those in which messages were waited for, floating-point operations, messages, and bytes in them."""
    growth: int = 0
    """Of memory at its peak, over what is live before."""


class Meter(OnShapes):
    """Within it, what meets a tensor of the meta device runs there, and takes time and memory on paper.

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
        self._memories: dict[int, tuple[int, Any]] = {}
        self._numbers = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Deferred in types:
            with self:  # What waits is computed, and that takes time as well.
                args, kwargs = computed(args), computed(kwargs)
        with without_functions():
            return self._take(func, args, kwargs) if meets_meta(args, kwargs) else func(*args, **kwargs)

    def _take(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on shapes, and count it."""
        if not has_meta(args) and _has_values(func):
            made = self._costs.shapes.run(func, args, kwargs)
            if isinstance(made, Tensor) and made.numel() <= _CONSTANT:
                # Real, wherever it was asked for: code may look at the values of what doesn't depend on the picture.
                return func(*args, **{**kwargs, "device": "cpu"})
        result, (seconds, flops, workspace) = self._costs.run(func, args, kwargs)
        if self._costs.shapes.makes(func):
            for tensor in tensors_of(result):
                self.follow(tensor)
        self.seconds += self._stand_in.turns * seconds
        self.flops += self._stand_in.turns * flops
        self.peak = max(self.peak, self.live + workspace)
        return result

    def follow(self, tensor: Tensor) -> None:
        """Count a new tensor's memory until the last tensor that shares it is gone."""
        storage = tensor.untyped_storage()
        key, size = number_of_storage(storage), storage.nbytes()
        if key in self._memories:
            return
        gone = weakref.ref(storage, lambda _: self._forget(key, size))
        self._memories[key] = next(self._numbers), gone
        self.live += size

    def memory_of(self, tensor: Tensor) -> int | None:
        """A number for the memory of a tensor, its own for ever; None where it was there before."""
        return self._memories.get(number_of_storage(tensor.untyped_storage()), (None,))[0]

    def _forget(self, key: int, size: int) -> None:
        del self._memories[key]
        self.live -= size

    @contextmanager
    def reading(self, comm: MeteredComm) -> Iterator[Reading]:
        """Yields what that costs which runs within it; it is told at the end."""
        cost, before, live, peak = Reading(), self._counts(comm), self.live, self.peak
        self.peak = live
        yield cost
        cost.counts = tuple(map(operator.sub, self._counts(comm), before))
        cost.growth = self.peak - live
        self.peak = max(peak, self.peak)

    def add(self, cost: Reading, comm: MeteredComm) -> None:
        """Let the same happen again; memory that is left of it has to be followed."""
        counts: Any = map(operator.add, self._counts(comm), cost.counts)
        self.seconds, self.exposed, self.flops, comm.traffic.messages, comm.traffic.bytes = counts
        self.peak = max(self.peak, self.live + cost.growth)

    def _counts(self, comm: MeteredComm) -> tuple[float, ...]:
        return self.seconds, self.exposed, self.flops, comm.traffic.messages, comm.traffic.bytes

    def wait_until(self, moment: float) -> None:
        """Let the clock stand at `moment` at least: what is missing is waiting."""
        waiting = max(0.0, moment - self.seconds)
        self.seconds += waiting
        self.exposed += waiting

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs within it."""
        with apart(), standing_in(self._costs.device) as self._stand_in, _OnShapes(), self:
            yield


_CONSTANT = 2**16
"""Elements of a constant at the most: a table of positions, a mask; larger ones are work."""


@functools.cache
def _has_values(func: Any) -> bool:
    """Whether an operator's result depends on its arguments alone: no memory as it is, no chance."""
    empty = str(func.overloadpacket).startswith("aten.empty")
    return not empty and torch.Tag.nondeterministic_seeded not in func.tags


class _OnShapes(autocast.Autocast):
    """Functions as the device runs them: cast under autocast, and attention as one operator.

    The meta device would build the matrix of all pairs.
    """

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _attend(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not query.is_meta or query.shape[:-2] != key.shape[:-2]:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    flat = [tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (query, key, value)]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*flat)[0]
    return fused.reshape(*query.shape[:-1], value.shape[-1])


class MeteredComm(SoloComm):
    """Stands for one rank of a group whose other ranks run alongside: messages take time on the meter's clock."""

    def __init__(self, rank: int, size: int, link: LinkSpeed, meter: Meter) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._link, self._meter = link, meter
        self._free = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no message is under way."""
        return self._free <= self._meter.seconds

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
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
