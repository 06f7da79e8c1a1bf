"""The two ways to run a half on a group: exactly on shards, or in the VAE's own tiles."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import Tensor

from halovae.base import timeline
from halovae.base.memory import PeakMemory
from halovae.base.options import AllOptions, gather_of
from halovae.calls.device_graphs import can_record
from halovae.calls.merge_steps import Merger, Steps, merged
from halovae.calls.replay import Graphs
from halovae.calls.state import settle
from halovae.calls.target import Target
from halovae.calls.verify import compression, make_probe, run_alone, scales_of, verify
from halovae.comm import Comm, Traffic
from halovae.comm.agreement import together
from halovae.exact.mesh import Mesh
from halovae.exact.run import Runner, on_shards, run_on_group
from halovae.exact.shard_plan import ShardPlan, plan_shards
from halovae.kernels import autocast, trials
from halovae.kernels.kept import apart
from halovae.kernels.precision import working_dtype
from halovae.kernels.weight_cache import forget
from halovae.predict.memory_check import Room
from halovae.tiles.tile_runner import TileRunner


@dataclass(frozen=True)
class Ran:
    """A result, and what the engine has to report of it: fields of `CallReport`."""

    result: Any
    mode: str
    report: dict[str, Any]
    phases: dict[str, float]
    recorded: int = 0
    """Bytes of a recording that was replayed: the device does not count them as in use."""


class Engine(Protocol):
    """Runs one half; called on every rank of the group with the same arguments."""

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran: ...

    def retreat(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> bool:
        """After a call has failed on all ranks: whether all are to make it again, in a way that takes less memory."""
        return False

    def settled(self) -> int:
        """How many things this rank remembers that all ranks have settled together."""
        ...

    def forget(self) -> None:
        """Settle them anew in the next call."""
        ...

    def free(self) -> None:
        """Give back the memory that is kept between calls."""
        return


def make_engine(comm: Comm, target: Target, options: AllOptions) -> Engine:
    if options.mode == "tile":
        return TileEngine(comm, target, options)
    if options.mode == "auto":
        from halovae.api.auto import AutoEngine

        return AutoEngine(comm, target, options)
    return ExactEngine(comm, target, options)


def _note(network_seconds: float, gather_seconds: float) -> None:
    """Keep the two phases that have just ended in the timeline."""
    ended = time.perf_counter()
    timeline.note("network", ended - gather_seconds - network_seconds, ended - gather_seconds)
    timeline.note("gather", ended - gather_seconds, ended)


class TileEngine(Engine):
    """The VAE's own tiles, spread over the ranks."""

    def __init__(self, comm: Comm, target: Target, options: AllOptions) -> None:
        self._comm, self._target, self._gather = comm, target, options.gather
        self._ranks, fit = options.size or comm.size, options.tiles == "fit"
        self._runner = TileRunner(comm, target, ranks=self._ranks, gather=options.gather, fit=fit)
        self._room = Room(target)

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran:
        settings, keep = self.settings(half, args, kwargs), gather_of(self._gather, half)
        if self._comm.rank < self._ranks:

            def ratio() -> int:
                return 1 if half == "decode" else compression(self._target, picture)

            self._room.check_tiles(half, settings, self._ranks, ratio, keep, picture, args, kwargs)
        outcome = self._runner.run(half, args, kwargs)
        _note(outcome.network_seconds, outcome.gather_seconds)
        report = {"tiles": outcome.tiles, "spread": outcome.spread, "tile_sizes": outcome.cut}
        phases = {"network": outcome.network_seconds, "gather": outcome.gather_seconds}
        return Ran(outcome.result, "tile", report, phases)

    def settled(self) -> int:
        return len(self._runner.plans)

    def forget(self) -> None:
        self._runner.plans.clear()

    def settings(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the VAE's settings for tiles are changed to. Called on every rank.

        Raises:
            TilingError: the VAE's tiles can't be used.
        """
        return self._runner.plan(half, args, kwargs).settings


class ExactEngine(Engine):
    """Spatial shards with halo exchange; plans, probes once, runs."""

    def __init__(self, comm: Comm, target: Target, options: AllOptions) -> None:
        self._comm, self._target, self._options = comm, target, options
        self._verified: set[tuple[str, tuple[int, int]]] = set()
        self._tried: set[Any] = set()
        self._ratio: int | None = None
        self._room = Room(target)
        self._merger = Merger(comm, target, options.frames_per_call)
        self._graphs = Graphs(comm, target, always=options.graphs is True)

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran:
        started = time.perf_counter()
        plan = self.plan(half, picture)
        keep = gather_of(self._options.gather, half)
        if self._comm.rank < prod(plan.shape):
            self._room.check(half, plan, self.ratio(half, picture), keep, picture, args, kwargs)
        kind = half, plan, tuple(picture.shape), picture.dtype, autocast.state()
        is_new = self._comm.size > 1 and kind not in self._tried
        if is_new:
            if picture.device.type == "cpu":
                for dtype in (picture.dtype, *filter(None, [autocast.dtype_of(picture.device)])):
                    working_dtype(dtype)  # What is sent depends on it.
            self._share_trials()
        self._verify_once(half, plan, args, kwargs)
        steps = self._merger.steps(half, plan, lambda: self._compression(half, picture), args, kwargs)
        probed = time.perf_counter()
        self._comm.traffic = Traffic()  # the probe's messages are not the call's
        memory = PeakMemory(picture.device)
        call = merged(self._target, half, steps)
        run = self._runner(half, plan, steps, picture, args, kwargs)
        outcome = run_on_group(self._comm, plan.shape, call, args, kwargs, plan.bounds, keep, run)
        settle(self._target.vae)
        if self._graphs.way == "plain":
            growth = memory.growth
            self._room.learn(half, plan, picture, growth)
            self._graphs.learn(half, growth)
        _note(outcome.network_seconds, outcome.gather_seconds)
        timeline.note("probe", started, probed)
        if is_new:
            self._share_trials()
            self._tried.add(kind)
        report = {
            "shape": plan.shape, "bounds": plan.bounds, "extents": outcome.extents, "steps": steps,
            "replayed": self._graphs.way == "replay", "kept_memory": self._graphs.kept,
        }  # fmt: skip
        phases = {
            "probe": probed - started,
            "network": outcome.network_seconds,
            "gather": outcome.gather_seconds,
        }
        return Ran(outcome.result, "exact", report, phases, self._graphs.growth)

    def settled(self) -> int:
        return len(self._verified) + len(self._tried) + len(self._merger.chosen)

    def forget(self) -> None:
        self._verified.clear()
        self._tried.clear()
        self._merger.chosen.clear()

    def free(self) -> None:
        self._graphs.clear()

    def retreat(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> bool:
        self.free()
        return False

    def _runner(
        self, half: str, plan: ShardPlan, steps: Steps, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Runner:  # fmt: skip
        self._graphs.begin()
        if not self._options.graphs or prod(plan.shape) < self._comm.size or not can_record(picture.device):
            return on_shards
        return functools.partial(self._graphs.run, half, (plan, steps, self._target.kind(half, args, kwargs)))

    def _share_trials(self) -> None:
        """Which kernels are fastest each rank has tried out by itself; all go on with the same answers."""
        if trials.adopt(self._comm.all_gather_object(trials.known())):
            forget()  # Weights in the order of kernels that are not chosen now.

    def ratio(self, half: str, picture: Tensor) -> int:
        """Rows of the input per latent row; 1 where nothing is cut."""
        return 1 if self._comm.size == 1 else self._compression(half, picture)

    def _compression(self, half: str, picture: Tensor) -> int:
        if half == "decode":
            return 1
        if self._ratio is None:
            self._ratio = compression(self._target, picture)
        return self._ratio

    def may_merge(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether several steps in time go in one call of the network, as far as it is known without trying."""
        return self._merger.may_merge(half, self.plan(half, picture), args, kwargs)

    def plan(self, half: str, picture: Tensor) -> ShardPlan:
        """How a picture is cut."""
        ranks, (height, width) = self._options.size or self._comm.size, picture.shape[-2:]
        return plan_shards(height, width, self.ratio(half, picture), ranks, self._options.axis)

    def _verify_once(self, half: str, plan: ShardPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first time a half runs on a grid of this shape; every rank learns how it ended."""
        if not self._options.verify or plan.shape == (1, 1) or (half, plan.shape) in self._verified:
            return
        is_in, ratio = self._comm.rank < prod(plan.shape), self._ratio if half == "encode" and self._ratio else 1
        verdict, alone, probe = None, None, make_probe(plan.shape, ratio, args, kwargs)
        # What fails in there fails the call at once: others may wait for a message of this rank.
        if is_in:
            alone = run_alone(self._target, half, probe)
        scales = self._comm.all_gather_object(None if alone is None or alone.is_finite else scales_of(args, kwargs))
        if given := next(filter(None, scales), None):
            # Noise may be too much for the VAE's range, where what the caller has is not.
            probe = make_probe(plan.shape, ratio, args, kwargs, scales=given)
            alone = run_alone(self._target, half, probe) if is_in else None
        if alone is not None:
            with apart():  # Its small pictures ask for weights in another order.
                verdict = verify(Mesh(self._comm, plan.shape), self._target, half, probe, alone)
        with together(self._comm):
            if verdict:
                raise verdict
        self._verified.add((half, plan.shape))
