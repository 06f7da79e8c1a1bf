"""The VAE's own tiles, spread over the ranks of a group."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from halovae.api.engine import Emit, Engine, Ran, StreamClosed, clip_first, emit_whole, found_parts, note_phases
from halovae.base.options import AllOptions, CallReport, Half, gather_of
from halovae.calls.resumed import Held, laid_out
from halovae.calls.target import Target
from halovae.calls.time_stages import Part, Stage, TimeStages
from halovae.calls.verify import compression
from halovae.comm import Comm
from halovae.comm.agreement import together
from halovae.exact.run import first_tensor
from halovae.predict.memory_check import Room
from halovae.tiles.tile_plan import TilePlan
from halovae.tiles.tile_runner import TileOutcome, TileRunner
from halovae.tiles.tile_stages import TileStages

_CLIPS = 8
"""Kinds of clips in tiles whose steps are remembered."""


class TileEngine(Engine):
    """The VAE's own tiles, spread over the ranks."""

    def __init__(self, comm: Comm, target: Target, options: AllOptions) -> None:
        self._comm, self._target, self._gather = comm, target, options.gather
        self._ranks, fit = options.size or comm.size, options.tiles == "fit"
        self._runner = TileRunner(
            comm, target, ranks=self._ranks, gather=options.gather, fit=fit, same_bits=options.same_bits
        )
        self._room = Room(target)
        self._stages: dict[Any, TileStages] = {}
        self._parts: dict[Any, tuple[TileStages, tuple[Part, ...]] | None] = {}

    def run(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit | None = None
    ) -> Ran:  # fmt: skip
        plan = self._runner.plan(half, args, kwargs)
        if emit:
            given = clip_first(args, kwargs)
            if found := self._in_parts(half, picture, *given, plan):
                return self._run_parts(half, *given, *found, plan, emit)
        keep = gather_of(self._gather, half)
        if self._comm.rank < self._ranks:

            def ratio() -> int:
                return 1 if half == "decode" else compression(self._target, picture)

            self._room.check_tiles(half, plan.settings, self._ranks, ratio, keep, picture, args, kwargs)
        outcome = self._runner.run(half, args, kwargs)
        ran = self._told(half, outcome)
        if emit:
            emit_whole(emit, ran.result)
            ran = replace(ran, result=None)
        return ran

    def _in_parts(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TilePlan
    ) -> tuple[TileStages, tuple[Part, ...]] | None:
        """The stages of a clip that leaves in pieces, and its parts; None where there is one piece."""
        kind = self._target.kind(half, args, kwargs)
        if kind not in self._parts:
            with together(self._comm) as said:

                def find() -> tuple[TileStages, tuple[Part, ...]]:
                    stages = self._runner.stages(half, picture[:, :, :1].clone(), args[1:], kwargs, plan)
                    return stages, stages.whole(picture.shape[2])

                found = found_parts(self._target, half, args, picture, find)
                said["pieces of the stream"] = [(count, stage.length) for count, stage, _ in found[1]] if found else []
            for old in list(self._parts)[: 1 - _CLIPS]:
                del self._parts[old]
            self._parts[kind] = found
        return self._parts[kind]

    def _run_parts(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TileStages, parts: tuple[Part, ...],
        plan: TilePlan, emit: Emit,
    ) -> Ran:  # fmt: skip
        clip, held, frames, reports = args[0], Held(), 0, list[CallReport]()
        with suppress(StreamClosed):
            for count, stage, _ in parts:
                frames, held.is_used_up = frames + count, True
                given = laid_out(stage, clip[:, :, :frames]), *args[1:]
                one, held = self.run_stage(half, given, kwargs, stages, stage, held)
                reports.append(one.report)
                if stage.length:
                    emit(first_tensor(one.result))
                del one
        phases = {name: sum(report.phases[name] for report in reports) for name in reports[-1].phases}
        report = replace(
            reports[-1], seconds=sum(phases.values()), phases=phases, tiles=len(plan.schedule.chains),
            spread=max(report.spread for report in reports),
        )  # fmt: skip
        return Ran(None, report)

    def _told(self, half: str, outcome: TileOutcome) -> Ran:
        """A result with its report."""
        note_phases(outcome.network_seconds, outcome.gather_seconds)
        phases = {"network": outcome.network_seconds, "gather": outcome.gather_seconds}
        report = CallReport(
            half=cast("Half", half), mode="tile", reference="tiles", seconds=sum(phases.values()), phases=phases,
            tiles=outcome.tiles, spread=outcome.spread, tile_sizes=outcome.cut,
            tiles_per_call=outcome.together.tiles, same_bits=outcome.together.same_bits,
        )  # fmt: skip
        return Ran(outcome.result, report)

    def stages(self, half: str, frame: Tensor, kwargs: dict[str, Any]) -> TimeStages:
        kind = self._target.kind(half, (frame,), kwargs)
        if kind not in self._stages:
            self._stages[kind] = self._runner.stages(half, frame.clone(), (), kwargs)
        return self._stages[kind]

    def run_stage(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TimeStages, stage: Stage, held: Held
    ) -> tuple[Ran, Held]:
        assert isinstance(stages, TileStages), "the steps are those of tiles"
        outcome, held = self._runner.run_stage(half, args, kwargs, stages, stage, held)
        return self._told(half, outcome), held

    def settled(self) -> int:
        return len(self._runner.plans) + len(self._parts)

    def forget(self) -> None:
        self._runner.plans.clear()
        self._parts.clear()

    def settings(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the VAE's settings for tiles are changed to. Called on every rank.

        Raises:
            TilingError: the VAE's tiles can't be used.
        """
        return self._runner.plan(half, args, kwargs).settings
