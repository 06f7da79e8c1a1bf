"""Calls of a kind that come again: the second is recorded, and from the third on they are replayed without Python.

On a shard, an accelerator's kernels take less time than Python takes to ask for them. `Tape` keeps them.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halovae.base.memory import PeakMemory, free_bytes
from halovae.base.private_diffusers import has_library_hook
from halovae.base.trees import map_tensors, tensors_in
from halovae.calls.device_graphs import Outlet, Take, Tape, can_record
from halovae.calls.module_facts import TELLING
from halovae.calls.randomness import frozen_generators
from halovae.calls.state import Snapshot, has_hooks, unchanged, undone_by_failure
from halovae.calls.target import Target
from halovae.calls.verify import is_rounding
from halovae.comm import Comm, GraphLane, Traffic
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh
from halovae.exact.run import Call, on_shards
from halovae.kernels import autocast
from halovae.kernels.kept import apart

LOG = logging.getLogger("halovae")
T = TypeVar("T")

_FREE_SHARE = 4
"""Without having been asked to, recordings keep at most this part of the memory that is free: others need it too."""

_MOST = 4
"""Recordings that are kept: a pipeline calls its VAE in a few sizes."""

_SEEN = 16
"""Kinds of calls that are remembered, to know one that comes again."""

_IDLE = 8
"""Calls after which a recording that was not used makes room for another one."""

_GAIN = 0.97
"""A replay pays where it takes less than this part of a call: less gain is within what two calls differ by."""


@dataclass(frozen=True)
class KernelRecording:
    """A call that can be replayed: the tape, and where on the device its arguments and its result are."""

    tape: Tape
    arguments: Any
    result: Any
    growth: int
    """Bytes that the recording holds beyond its arguments and its result."""
    note: str
    """Why messages are not in the graph, where that was tried."""

    def __str__(self) -> str:
        tape = self.tape
        graphs = f"{tape.graphs} graph{'s' * (tape.graphs > 1)}"
        if not tape.exchanges:
            return graphs
        if tape.is_whole:
            return f"{graphs} with {tape.exchanges} exchanges inside"
        return f"{graphs} with {tape.exchanges} exchanges between them{self.note and f' ({self.note})'}"

    def replay(self, arguments: Any, take: Take) -> Any:
        """The result for other arguments of the same kind; in new memory, as are the parts that `take` gets before."""
        with self.tape.turn():
            for place, tensor in zip(tensors_in(self.arguments), tensors_in(arguments), strict=True):
                place.copy_(tensor)
            self.tape.replay(take)
            return map_tensors(_copied, self.result)


class Graphs:
    """The recordings of one rank: of the kinds of calls that came last. Every rank of the group makes one.

    Args:
        comm: the group. All its ranks have a shard.
        always: record whatever can be; else only where that pays and little memory is kept.

    Attributes:
        way: how the last call went: "plain", "record" or "replay".
        growth: bytes of what was replayed that the device does not count as in use.
        replayed: what was replayed in the last call, in words, or nothing.
    """

    def __init__(self, comm: Comm, target: Target, always: bool = True) -> None:
        self._comm, self._target, self._always = comm, target, always
        self._recordings: dict[Any, KernelRecording] = {}
        """By kind of call; the one that was used last comes last."""
        self._seen: dict[Any, int | None] = {}
        """Kinds of calls that were not replayed, and by how many bytes the peak of one was above what was in use."""
        self._refused: set[Any] = set()
        self._calls, self._used = 0, dict[Any, int]()
        self.begin()

    def begin(self) -> None:
        """Before a call."""
        self.way, self.growth, self.replayed = "plain", 0, ""
        self._last: Any = None

    def clear(self) -> None:
        """Free what is kept."""
        self._recordings.clear()
        self._seen.clear()

    def learn(self, growth: int) -> None:
        """Take in by how many bytes the peak of this call, not a replay, was above what was in use before."""
        if self._last in self._seen:
            self._seen[self._last] = growth

    def drop(self, call: Any) -> None:
        """Free what is kept of calls of which `Target.kind` says this."""
        for key in [key for key in self._recordings if key[0][-1] == call]:
            del self._recordings[key]

    @property
    def kept(self) -> int:
        """Bytes that recordings keep."""
        return sum(recording.growth for recording in self._recordings.values())

    def run(
        self, half: str, kind: Callable[[], Any], outlet: Outlet, mesh: Mesh, call: Call, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """As `on_shards`; all ranks replay, record, or do neither.

        Args:
            kind: tells what the call depends on besides the weights and the values of its tensors; at its end, what
                `Target.kind` says of it.
            outlet: gets what the call leaves before its end.
        """
        key = self._key(kind)
        self._calls += 1
        self._used[key] = self._calls
        self._drop_void(key)
        ways = set(self._comm.all_gather_object(self._way_of(key, (args, kwargs))))
        recording = self._recordings.pop(key, None)
        if ways == {"replay"} and recording:
            self._recordings[key] = recording
            self.way, self.growth, self.replayed = "replay", recording.growth, str(recording)
            return recording.replay((args, kwargs), outlet.take)
        del recording
        if "plain" in ways:
            result = on_shards(mesh, call, args, kwargs)
            self._note(self._key(kind))  # As the next call finds it: the first one may leave new attributes.
            return result
        self.way = "record"
        return self._run_and_record(half, key, outlet, mesh, call, (args, kwargs))

    def _key(self, kind: Callable[[], Any]) -> Any:
        return kind(), _settings(), self._target.facts.reading(), self._comm.era

    def _note(self, key: Any) -> None:
        self._last = key
        self._seen[key] = self._seen.pop(key, None)
        for old in list(self._seen)[:-_SEEN]:
            del self._seen[old]
        self._used = {key: self._used.get(key, 0) for key in (*self._seen, *self._recordings)}

    def _drop_void(self, key: Any) -> None:
        """Drop recordings of other weights, and those that a failure has made void."""
        for old in [old for old in self._recordings if old[2:] != key[2:]]:
            del self._recordings[old]

    def _way_of(self, key: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
        """What this rank would do."""
        if key in self._recordings:
            return "replay"
        able = key in self._seen and key not in self._refused and _is_plain(*arguments)
        return "record" if able and (self._always or self._is_wanted(key, arguments)) else "plain"

    def _is_wanted(self, key: Any, arguments: Any) -> bool:
        """Whether to record without having been asked to."""
        free, taken = free_bytes(tensors_in(arguments)[0].device), self._seen[key]
        if free is None or taken is None or is_hooked(self._target.vae):
            return False
        idle = [old for old in self._recordings if self._calls - self._used[old] > _IDLE]
        lasting = self.kept - sum(self._recordings[old].growth for old in idle)
        if _FREE_SHARE * (lasting + taken) > free + self.kept:
            return False
        while _FREE_SHARE * (self.kept + taken) > free + self.kept:
            free += self._recordings.pop(idle.pop(0)).growth
        return True

    def _run_and_record(
        self, half: str, key: Any, outlet: Outlet, mesh: Mesh, call: Call, arguments: Any
    ) -> Any:  # fmt: skip
        """The result of an ordinary call. A recording that gives another one is not kept."""
        copies = args, kwargs = map_tensors(_copied, arguments)
        device, before = tensors_in(arguments)[0].device, Snapshot(self._target.facts)
        parts, take = list[Tensor](), outlet.take

        def copy_and_take(part: Tensor) -> None:
            parts.append(_copied(part))
            take(part)

        with outlet.to(copy_and_take):
            result, seconds = timed(self._comm, device, lambda: on_shards(mesh, call, *arguments))
        traffic = self._comm.traffic
        # A replay leaves nothing in the VAE that the next call could go on with, and nothing in the caller's tensors.
        pairs = zip(tensors_in(arguments), tensors_in(copies), strict=True)
        able = not before.has_gone_on() and all(torch.equal(*pair) for pair in pairs)
        problem = self._first("" if able else "it leaves something behind")
        # Until it has turned out well: what fails in here is not to fail each time.
        self._refused = (self._refused & self._seen.keys()) | {key}
        self._comm.traffic = Traffic()  # What the trial sends is not the call's.
        lane = self._comm.lane_of_graphs(device)
        recording, replay_seconds, ways = None, 0.0, (lane, None) if lane else (None,)
        with frozen_generators(device), unchanged(self._target.facts):
            for way in () if problem else ways:
                recording = None  # The memory of one that did not go well.
                recording, problem = self._record(outlet, mesh, call, args, kwargs, way, problem)
                problem = self._first(problem)  # Before anything of it is launched.
                if recording and not problem:
                    found, replay_seconds = timed(self._comm, device, functools.partial(_replayed, recording, copies))
                    problem = self._first("" if _is_near(found, (result, parts)) else "its replay gives another result")
                    del found
                if not problem:
                    break
        self._comm.traffic = traffic
        if problem or recording is None:
            level = logging.WARNING if self._always else logging.INFO
            LOG.log(level, "%s of %s can't be replayed (%s): it goes on as before", half, self._target.name, problem)
            return result
        plain, replayed = zip(*self._comm.all_gather_object((seconds, replay_seconds)), strict=True)
        if self._always or max(replayed) < _GAIN * max(plain):
            for old in list(self._recordings)[: 1 - _MOST]:
                del self._recordings[old]
            self._recordings[key] = recording
            self._refused.discard(key)
        else:
            LOG.info("%s of %s takes as long replayed: it goes on as before", half, self._target.name)
        return result

    def _first(self, problem: str) -> str:
        """The first problem that a rank has, so that all go on alike."""
        problems = self._comm.all_gather_object(problem)
        return next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), "")

    def _record(
        self, outlet: Outlet, mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any],
        lane: GraphLane | None, note: str,
    ) -> tuple[KernelRecording | None, str]:  # fmt: skip
        """A recording, or why there is none. Sends nothing, so a rank may fail in it by itself."""
        device = tensors_in((args, kwargs))[0].device
        gc.collect()
        memory = PeakMemory(device)
        try:
            tape = Tape(self._comm, device, lane)
            # Weights are put in order on the tape too: what others keep of them may be freed.
            with undone_by_failure(self._target.facts), apart(), outlet.to(tape.part), tape.recording():
                result = on_shards(Mesh(tape, mesh.shape), call, args, kwargs)
        except Exception as error:  # Whatever asks the device for an answer, or finds no memory.
            self._comm.check()
            LOG.info("a call of %s can't be recorded: %s", self._target.name, error)
            return None, str(error).split("\n", 1)[0] or type(error).__name__
        held = sum(tensor.nbytes for tensor in tensors_in(result))
        return KernelRecording(tape, (args, kwargs), result, max(0, memory.growth - held), note), ""


def timed(comm: Comm, device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
    """A result, and the seconds until the device of this rank has it."""
    module = torch.get_device_module(device)
    module.synchronize(device)
    started = time.perf_counter()
    result = run()
    comm.synchronize()
    module.synchronize(device)
    return result, time.perf_counter() - started


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call depends on nothing but its tensors on the device, and on what its kind tells."""
    return all(
        can_record(value.device) if isinstance(value, Tensor) else isinstance(value, (*TELLING, type(None)))
        for value in (*args, *kwargs.values())
    )


def is_hooked(vae: nn.Module) -> bool:
    """Whether somebody's code hangs on a module: in a replay it would not run."""
    return has_hooks(vae) or any(map(has_library_hook, vae.modules()))


def _replayed(recording: KernelRecording, arguments: Any) -> tuple[Any, list[Tensor]]:
    """The result, and what was there before it."""
    parts: list[Tensor] = []
    return recording.replay(arguments, parts.append), parts


def _copied(tensor: Tensor) -> Tensor:
    return mark(tensor.clone(), layout_of(tensor))


def _settings() -> tuple[Any, ...]:
    """What torch is set to that changes the kernels of a call, or who may write into its results."""
    return torch.is_inference_mode_enabled(), autocast.state()


def _is_near(found: Any, expected: Any) -> bool:
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    try:
        return all(torch.equal(*pair) or (pair[0].is_floating_point() and is_rounding(*pair)) for pair in pairs)
    except RuntimeError as error:  # Too little memory to compare with.
        LOG.info("a recording can't be compared: %s", error)
        return False
