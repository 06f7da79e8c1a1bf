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
from torch import Tensor, nn

from halovae.base.functions import outside_modes
from halovae.base.private_torch import number_of_storage, pytree, schema, without_functions, without_modes
from halovae.base.trees import tensors_of
from halovae.calls.dataflow import OnShapes, Shapes, fresh, has_meta, key_of, meets_meta
from halovae.calls.record import NETWORKS, answering
from halovae.calls.state import ModuleState, refill
from halovae.comm import Message, Pending, SoloComm
from halovae.comm.bandwidth import LinkSpeed
from halovae.exact.layout import layout_of, mark
from halovae.kernels import autocast
from halovae.kernels.kept import apart, kept
from halovae.kernels.lazy.deferred import Deferred, computed, recipe_of
from halovae.kernels.lazy.joined import Joined
from halovae.kernels.shapes_only import standing_in
from halovae.predict.rates import Operation, Speed

Cost = tuple[float, int, int]
"""Seconds, floating-point operations, and bytes beside arguments and result."""


class Costs:
    """What operators return and take, by the shapes of their arguments. Runs for one device share it."""

    def __init__(self, speed: Speed) -> None:
        self.device = speed.device
        self._speed = speed
        self.shapes = Shapes({})
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


# ---- network calls of one kind followed once -------------------------------------------------------------------------
#
# A VAE that walks through time or over tiles calls its network alike again. What a call does to shapes, clock and
# memory is noted when it is followed, and repeated for the next ones. One in which kernels keep something of the
# weights is not noted, since the next one finds that.


@dataclass(frozen=True)
class _View:
    """A tensor after a call, by where its memory is."""

    memory: int
    """The place of the leaf before the call that has the same one; below 0 the number of a new one."""
    size: int
    """Bytes of all of it."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    layout: Any


Tree = tuple[tuple[Any, ...], Any]
"""Leaves and their structure."""


@dataclass(frozen=True)
class _Effect:
    """What calls of one kind do."""

    result: Tree
    after: Tree
    """Arguments and what the modules keep."""
    cost: Reading


Effects = dict[Any, _Effect]
"""By kind."""


class _NotAgain(Exception):
    """A call that can't be repeated from what is known of it."""


class _Echo:
    def __init__(self, network: nn.Module, meter: Meter, comm: MeteredComm, known: Effects) -> None:
        self._network, self._meter, self._comm, self._known = network, meter, comm, known
        self._state = ModuleState(network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, before = self._look(args, kwargs)
        if key is None or not self._comm.is_idle:
            return self._network(*args, **kwargs)
        if key in self._known:
            return self._repeat(self._known[key], args, kwargs, before)
        places, kept_before = self._places(before), _kept()
        del before  # The network may let go of what is in it.
        with self._meter.reading(self._comm) as cost:
            result = self._network(*args, **kwargs)
        if _kept() == kept_before and self._comm.is_idle:
            self._note(key, places, result, args, kwargs, cost)
        return result

    @outside_modes
    def _look(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """What tells calls apart, and the leaves of arguments and state.

        The first is None where something among the arguments is still to be computed.
        """
        try:
            before, structure = _taken_apart((args, kwargs, self._state.changed()))
            key = structure, tuple(map(_described, before)), _kept()[0], autocast.state()
            hash(key)
        except (_NotAgain, TypeError):
            return None, []
        return key, before

    @outside_modes
    def _places(self, before: list[Any]) -> dict[int, int]:
        """The first of these leaves in each memory."""
        tensors = [(place, leaf) for place, leaf in enumerate(before) if isinstance(leaf, Tensor)]
        return {self._memory_of(_plain(leaf)): place for place, leaf in reversed(tensors)}

    def _memory_of(self, tensor: Tensor) -> int:
        """A number for its memory, below 0 for what was there before the run."""
        number = self._meter.memory_of(tensor)
        return -number_of_storage(tensor.untyped_storage()) if number is None else number

    @outside_modes
    def _note(self, key: Any, places: dict[int, int], result: Any, args: Any, kwargs: Any, cost: Reading) -> None:
        new: dict[int, int] = {}

        def view(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            _check_marks(leaf)
            tensor = _plain(leaf)
            memory = self._memory_of(tensor)
            if (place := places.get(memory)) is None:
                if memory < 0:
                    raise _NotAgain  # of a weight
                place = new.setdefault(memory, -1 - len(new))
            return _View(
                place, tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor.stride(),
                int(tensor.storage_offset()), tensor.dtype, layout_of(leaf),
            )  # fmt: skip

        try:
            trees = map(_taken_apart, (result, (args, kwargs, self._state.changed())))
            noted, after = ((tuple(map(view, leaves)), structure) for leaves, structure in trees)
            self._known[key] = _Effect(noted, after, cost)
        except _NotAgain:
            return

    @outside_modes
    def _repeat(self, effect: _Effect, args: Any, kwargs: Any, before: list[Any]) -> Any:
        new: dict[int, Any] = {}

        def memory(view: _View) -> Any:
            if view.memory >= 0:
                return _plain(before[view.memory]).untyped_storage()
            if view.memory not in new:
                tensor = torch.empty(view.size, dtype=torch.uint8, device="meta")
                self._meter.follow(tensor)
                new[view.memory] = tensor.untyped_storage()
            return new[view.memory]

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, _View):
                return leaf
            tensor = torch.empty(0, dtype=leaf.dtype, device="meta")
            return mark(tensor.set_(memory(leaf), leaf.offset, leaf.shape, leaf.stride), leaf.layout)

        with without_modes():
            self._meter.add(effect.cost, self._comm)
            after, result = (pytree.tree_unflatten(list(map(made, leaves)), structure) for leaves, structure in (
                effect.after, effect.result))  # fmt: skip
            new_args, new_kwargs, new_state = after
            refill((args, kwargs), (new_args, new_kwargs))
            self._state.set(new_state)
            return result


@contextmanager
def echoing(vae: nn.Module, half: str, meter: Meter, comm: MeteredComm, known: Effects) -> Iterator[None]:
    """Within it, the VAE's network is followed once for calls of each kind.

    Args:
        meter: whose clock and memory are to be right.
        known: what calls did, for runs in which calls of one kind do the same.
    """
    network = getattr(vae, NETWORKS[half], None)
    if not isinstance(network, nn.Module):
        yield
        return
    with answering(vae, half, _Echo(network, meter, comm, known)):
        yield


def _kept() -> tuple[Any, int]:
    """What kernels have found out that tells how the next call runs, and how much they have made of weights."""
    return frozenset(kept().rooms.items()), sum(len(made.by_kind) for made in kept().weights.values())


class _Waiting:
    """A join that is still to be computed, as a node of a tree: its parts are the leaves."""

    def __init__(self, join: Joined, layout: Any) -> None:
        self.parts = list(join.parts)
        self.words = join.dim, (*join.pads.items(),), join.fill, (*join.beyond.items(),), layout


def _join_again(parts: Any, words: Any) -> Tensor:
    dim, pads, fill, beyond, layout = words
    return mark(Deferred(Joined(tuple(parts), dim, dict(pads), fill, dict(beyond))), layout)


pytree.register_pytree_node(_Waiting, lambda waiting: (waiting.parts, waiting.words), _join_again)


def _taken_apart(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, joins that wait taken apart too."""
    return pytree.tree_flatten(pytree.tree_map_only(Deferred, _opened, value))


def _opened(tensor: Deferred) -> Any:
    recipe = recipe_of(tensor)
    if not isinstance(recipe, Joined) or recipe.halo:
        return tensor
    _check_marks(tensor)
    return _Waiting(recipe, layout_of(tensor))


def _described(leaf: Any) -> Any:
    """What tells a leaf from others."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    _check_marks(leaf)
    tensor = _plain(leaf)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, layout_of(leaf)


def _check_marks(tensor: Tensor) -> None:
    """Check that nothing is known of a tensor but what is repeated."""
    own = 2 if isinstance(tensor, Deferred) else 0
    if len(vars(tensor)) > own + (layout_of(tensor) is not None):
        raise _NotAgain


def _plain(tensor: Tensor) -> Tensor:
    """What has memory."""
    if not isinstance(tensor, Deferred):
        return tensor
    if tensor.value is None:
        raise _NotAgain
    return _plain(tensor.value)
