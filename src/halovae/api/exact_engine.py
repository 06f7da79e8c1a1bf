"""Exactly, on shards of the picture: the engine, and its kinds of calls."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from halovae.api.engine import (
    Emit,
    Engine,
    Given,
    Ran,
    StreamClosed,
    clip_first,
    emit_whole,
    found_parts,
    note_phases,
)
from halovae.base import timeline, verdicts
from halovae.base.errors import NotExactError, TooLittleMemoryError
from halovae.base.memory import PeakMemory, is_shortage
from halovae.base.options import AllOptions, CallReport, Half, gather_of
from halovae.calls.blueprint import words_of
from halovae.calls.compile_kernels import compile_kernels
from halovae.calls.contest import Contest
from halovae.calls.device_graphs import Outlet, can_record
from halovae.calls.exact_call import ExactCall
from halovae.calls.merge_steps import Merger, Steps
from halovae.calls.replay import Graphs
from halovae.calls.resumed import Held, Resumed, WholeClip
from halovae.calls.state import settle, undone_by_failure
from halovae.calls.target import Target
from halovae.calls.time_stages import Part, Stage, TimeStages, one_step
from halovae.calls.verify import Probe, compression, make_probe, run_alone, scales_of, verify
from halovae.comm import Comm, SoloComm, Traffic, backend_name
from halovae.comm.agreement import one_call, together, verdict_of_all
from halovae.exact.mesh import Mesh, ShardPlan
from halovae.exact.run import GroupRun, Runner, on_shards
from halovae.kernels.kept import apart
from halovae.predict.memory_check import Room

LOG = logging.getLogger("halovae")


class ExactEngine(Engine):
    """Spatial shards with halo exchange.

    Attributes:
        verified: halves and grids whose probe has gone well.
        compiled: halves, cuts and dtypes whose kernels are compiled.
        room: what is known of memory.
        merger: what is known of steps in time.
        graphs: the recordings.
        parts: of clips that leave in pieces, by kind of call; none where there is one piece.
        solo: makes calls of this rank alone, where there may be any.
        contest: decides which calls are made so.
    """

    def __init__(self, comm: Comm, target: Target, options: AllOptions) -> None:
        self.comm, self.target, self.options = comm, target, options
        self.verified: set[tuple[str, tuple[int, int]]] = set()
        self.compiled: set[tuple[str, ShardPlan, torch.dtype]] = set()
        self.room = Room(target)
        self.merger = Merger(comm, target, options.frames_per_call)
        self.graphs = Graphs(comm, target, always=options.graphs is True)
        self.parts: dict[Any, tuple[Part, ...]] = {}
        self._stages: dict[Any, TimeStages] = {}
        self._ratio: int | None = None
        self.solo: ExactEngine | None = None
        self.contest: Contest | None = None
        is_free = options.axis == "auto" and options.size is None and not options.same_bits
        if comm.size > 1 and options.alone and is_free:
            self.solo = ExactEngine(SoloComm(), target, replace(options, gather="all"))
            question = options.frames_per_call, options.graphs
            self.contest = Contest(comm, target, options.alone is True, question)

    def run(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit | None = None
    ) -> Ran:  # fmt: skip
        contest, solo, keep = self.contest, self.solo, gather_of(self.options.gather, half)
        if contest:
            contest.begin()
        if emit:
            return _InPieces(self, half, args, kwargs, emit).make()
        if contest is None or solo is None or keep == "shard":
            return _OnRanks(self, half, args, kwargs).make()
        ran = contest.run(
            half, args, kwargs, keep=keep,
            shards=lambda *given: _OnRanks(self, half, *given).make(),
            alone=lambda *given: _Alone(self, solo, half, *given).make(),
            trial=lambda *given: _OnRanks(solo, half, *given).make(),
        )  # fmt: skip
        if contest.seconds:  # It has just been decided.
            (self if contest.is_alone else solo).graphs.drop(self.target.kind(half, args, kwargs))
        phases = ran.report.phases | ({"trial": contest.seconds} if contest.seconds else {})
        return replace(ran, report=replace(ran.report, phases=phases, alone=contest.words))

    def stages(self, half: str, frame: Tensor, kwargs: dict[str, Any], more: tuple[Any, ...] = ()) -> TimeStages:
        kind = self.target.kind(half, (frame, *more), kwargs)
        if kind not in self._stages:
            method = functools.partial(self.target.run_untiled, half)
            record = functools.partial(self.merger.record, half)
            side, frame = 8 * self.compression(half, frame), frame.clone()  # Not with all of its clip.
            small = frame[..., :side, :side]
            self._stages[kind] = TimeStages(self.target.vae, half, method, record, frame, small, more, kwargs)
        return self._stages[kind]

    def run_stage(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TimeStages, stage: Stage, held: Held
    ) -> tuple[Ran, Held]:
        call = _OneStage(self, half, args, kwargs, Resumed(self.target.vae, half, stages, stage, held))
        return call.make(), call.resumed.held

    def settled(self) -> int:
        tried = self.contest.settled() if self.contest else 0
        return len(self.verified) + len(self.merger.chosen) + len(self.parts) + tried

    def forget(self) -> None:
        self.verified.clear()
        self.merger.chosen.clear()
        self.parts.clear()
        if self.contest:
            self.contest.forget()

    def free(self) -> None:
        self.graphs.clear()
        if self.solo:
            self.solo.free()

    def retreat(self, half: str, given: Given, error: BaseException, is_out: bool = False) -> bool:
        self.free()
        if self.contest is None:
            return False
        # All ranks ask, whatever they know: one that failed before its contest began still knows of the last call's.
        mine = is_shortage(error), self.contest.is_at_risk
        try:
            with one_call(self.comm):
                short, at_risk = zip(*self.comm.all_gather_object(mine), strict=True)
        except Exception:  # A rank has died: the first error says more.
            return False
        return any(short) and all(at_risk) and self.contest.give_up()

    def compression(self, half: str, picture: Tensor) -> int:
        """Pixels per latent for encode, 1 for decode."""
        if half == "decode":
            return 1
        if self._ratio is None:
            self._ratio = compression(self.target, picture)
        return self._ratio

    def outlook(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ShardPlan, bool]:
        """How a call is cut, and whether it joins steps in time, as far as it is known without trying."""
        call = _OnRanks(self, half, args, kwargs)
        call.plan()
        return call.shards, self.merger.may_merge(half, call.shards, args, kwargs)


class _OnRanks(ExactCall[Ran]):
    """On the ranks of a group and their devices."""

    in_pieces = False

    def __init__(self, engine: ExactEngine, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = engine.options
        super().__init__(
            engine.target, engine.merger, half, args, kwargs, ranks=options.size or engine.comm.size,
            axis=options.axis, keep=gather_of(options.gather, half),
        )  # fmt: skip
        self.comm, self._engine = engine.comm, engine
        self._outlet = Outlet()
        self._started = self._probed = time.perf_counter()

    def compression(self) -> int:
        return self._engine.compression(self.half, self.picture)

    def ratio(self) -> int:
        return 1 if self.comm.size == 1 else self.compression()

    @property
    def _has_shard(self) -> bool:
        return self.comm.rank < prod(self.shards.shape)

    def compile(self) -> None:
        key = self.half, self.shards, self.picture.dtype
        if not self._has_shard or key in self._engine.compiled:
            return
        self._engine.compiled.add(key)
        compile_kernels(self.target, self.half, self.comm.rank, self.shards, self.ratio, self.args, self.kwargs)

    def memory(self) -> None:
        if self._has_shard:
            engine, given = self._engine, (self.picture, self.args, self.kwargs)
            check = functools.partial(engine.room.check, self.half, self.shards, self.ratio(), self._keep, *given)
            try:
                check()
            except TooLittleMemoryError:
                if not engine.graphs.kept:
                    raise
                engine.graphs.clear()  # The other ranks learn of it when they ask for a replay.
                check()

    def probe(self) -> None:
        """The first time a half runs on a grid of this shape; every rank learns how it ended."""
        half, shape, args, kwargs, comm = self.half, self.shards.shape, self.args, self.kwargs, self.comm
        if not self._engine.options.verify or shape == (1, 1) or (half, shape) in self._engine.verified:
            return
        ratio = self.compression()
        verdict, alone, probe = None, None, make_probe(shape, ratio, args, kwargs)
        name = self._name(probe)
        if verdict_of_all(comm, name) is True:
            self._engine.verified.add((half, shape))
            return
        # What fails in there fails the call at once: others may wait for a message of this rank.
        if self._has_shard:
            alone = run_alone(self.target, half, probe, args, kwargs)
        scales = comm.all_gather_object(None if alone is None or alone.is_finite else scales_of(args, kwargs))
        if given := next(filter(None, scales), None):
            # Noise may be too much for the VAE's range, where what the caller has is not.
            name, probe = None, make_probe(shape, ratio, args, kwargs, scales=given)
            alone = run_alone(self.target, half, probe, args, kwargs) if self._has_shard else None
        if alone is not None:
            with apart():  # Its small pictures ask for weights in another order.
                verdict = verify(Mesh(comm, shape), self.target, half, probe, alone)
        with together(comm):
            if verdict:
                raise verdict
        self._engine.verified.add((half, shape))
        # A failure is found anew each time, since it says where. Where all is NaN, nothing was compared.
        if comm.rank == 0 and alone is not None and alone.is_finite:
            verdicts.write(name, True)

    def _name(self, probe: Probe) -> str | None:
        """Of the verdict that the probe gives."""
        words = words_of(self.target, self.half, probe.args, probe.kwargs)
        group = self.shards.shape, probe.bounds, self.comm.size, backend_name()
        return words and verdicts.name_of(probe.device, "exact", *group, words)

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._probed = time.perf_counter()
        self.comm.traffic = Traffic()  # the probe's messages are not the call's
        memory = PeakMemory(self.picture.device)
        yield
        settle(self.target.facts)
        if self._engine.graphs.way == "plain":
            self._learn(memory.growth)

    def _learn(self, growth: int) -> None:
        """How many bytes the call took."""
        self._engine.room.learn(self.half, self.shards, self.picture, growth)
        self._engine.graphs.learn(growth)

    def runner(self) -> Runner:
        graphs = self._engine.graphs
        graphs.begin()
        all_work = prod(self.shards.shape) == self._engine.comm.size
        if not self._engine.options.graphs or not all_work or not can_record(self.picture.device):
            return on_shards

        def kind() -> Any:
            return self.in_pieces, self.shards, self.steps, self.target.kind(self.half, self.args, self.kwargs)

        return functools.partial(graphs.run, self.half, kind, self._outlet)

    def report(self) -> Ran:
        work, graphs = self.work, self._engine.graphs
        note_phases(work.network_seconds, work.gather_seconds)
        timeline.note("probe", self._started, self._probed)
        phases = {
            "probe": self._probed - self._started,
            "network": work.network_seconds,
            "gather": work.gather_seconds,
        }
        report = CallReport(
            half=cast("Half", self.half), mode="exact", reference="un-tiled", phases=phases,
            seconds=sum(phases.values()), shape=self.shards.shape, bounds=self.shards.bounds, extents=work.extents,
            steps=self.steps, replayed=graphs.way == "replay", recording=graphs.replayed,
            kept_memory=graphs.kept,
        )  # fmt: skip
        return Ran(self.result, report, graphs.growth)


class _Alone(_OnRanks):
    """The whole picture on each rank that gets the result; the others learn what it is."""

    def __init__(
        self, engine: ExactEngine, solo: ExactEngine, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:  # fmt: skip
        super().__init__(solo, half, args, kwargs)
        if gather_of(engine.options.gather, half) == "first":
            self.comm, self._keep = engine.comm, "first"

    def ratio(self) -> int:
        return 1

    def join_steps(self) -> None:
        self.steps = ()
        if self._has_shard:
            super().join_steps()


class _InStages(_OnRanks):
    """A call of stages of a clip."""

    def join_steps_of(self, stages: TimeStages, joins: bool) -> None:
        """How many steps of the stages go in each call of the network.

        Args:
            stages: of the clip.
            joins: whether a call joins steps.
        """
        most = functools.partial(self._engine.merger.most, self.half, self.shards)
        self._stages, self._joins, stages.most = stages, joins, most if joins else one_step

    def steps_of(self, stage: Stage) -> Steps:
        """How many calls of a stage go in each call of the network."""
        return stage.steps(self._stages.most) if self._joins and not self._stages.blends else ()


class _InPieces(_InStages):
    """A call whose output leaves in pieces, and is never whole."""

    in_pieces = True

    def __init__(
        self, engine: ExactEngine, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:  # fmt: skip
        super().__init__(engine, half, *clip_first(args, kwargs))
        self._emit = emit
        self._outlet = Outlet(self._part)

    def memory(self) -> None:
        """What a whole call takes says nothing of this one."""

    def join_steps(self) -> None:
        super().join_steps()
        engine, kind = self._engine, (self.shards, self.target.kind(self.half, self.args, self.kwargs))
        if kind not in engine.parts:
            with together(self.comm) as said:
                found = self._found()
                said["pieces of the stream"] = [(count, stage.length) for count, stage, _ in found]
            engine.parts[kind] = found
        self._parts = engine.parts[kind]
        if self._parts:
            self.join_steps_of(self._known_stages(), bool(self.steps))

    def _known_stages(self) -> TimeStages:
        return self._engine.stages(self.half, self.picture[:, :, :1], self.kwargs, self.args[1:])

    def _found(self) -> tuple[Part, ...]:
        """The parts of the clip; none where there is one only."""

        def find() -> tuple[TimeStages, tuple[Part, ...]]:
            stages = self._known_stages()
            self.join_steps_of(stages, bool(self.steps))
            parts = stages.whole(self.picture.shape[2])
            if stages.blends and max(self.steps, default=1) > 1:
                raise NotExactError("its steps go together, and its frames are made of several of them")
            return stages, parts

        found = found_parts(self.target, self.half, self.args, self.picture, find)
        return found[1] if found else ()

    def _learn(self, growth: int) -> None:
        self._engine.graphs.learn(growth)  # A whole call takes more.

    def run(self) -> None:
        if not self._parts:
            super().run()
            return
        self.work = GroupRun(self.comm, self.shards, self.args, self.kwargs, self._keep)
        clip = WholeClip(self.target.vae, self.half, self._stages, self._parts, self.steps_of, self._outlet)
        call = functools.partial(clip, functools.partial(self.target.run_untiled, self.half))
        with suppress(StreamClosed), undone_by_failure(self.target.facts, self.args, self.kwargs):
            self.work.run(call, self.runner())
            if not self._has_shard:
                for _, stage, _ in self._parts:
                    if stage.length:
                        self._part(None)

    def _part(self, frames: Tensor | None) -> None:
        self._emit(self.work.gather_part(frames))

    def gather(self) -> None:
        self.result = None
        if not self._parts:
            super().gather()
            result, self.result = self.result, None
            emit_whole(self._emit, result)


class _OneStage(_InStages):
    """A stage of a clip that comes in parts."""

    def __init__(
        self, engine: ExactEngine, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], resumed: Resumed
    ) -> None:  # fmt: skip
        super().__init__(engine, half, args, kwargs)
        self.resumed = resumed

    def join_steps(self) -> None:
        stages, merger = self.resumed.stages, self._engine.merger
        steps = merger.steps(self.half, self.shards, self.compression, (stages.long_clip,), self.kwargs)
        self.join_steps_of(stages, bool(steps))
        self.steps = self.resumed.steps = self.steps_of(self.resumed.stage)

    def runner(self) -> Runner:
        self._engine.graphs.begin()
        return on_shards

    def run(self) -> None:
        self.work = GroupRun(self.comm, self.shards, self.args, self.kwargs, self._keep)
        self.work.run(functools.partial(self.resumed, functools.partial(self.target.run_untiled, self.half)))
