"""The two ways to run a half on a group: exactly on shards, or in the VAE's own tiles."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from halovae.agreement import together
from halovae.comm import Comm, Traffic
from halovae.config import Options
from halovae.exact.mesh import Mesh
from halovae.exact.run import run_on_group
from halovae.plan import ShardPlan, plan_shards
from halovae.target import Target
from halovae.tile.run import TileRunner
from halovae.verify import compression, make_probe, verify


@dataclass(frozen=True)
class Ran:
    """A result, and what the engine has to report of it: fields of `CallReport`."""

    result: Any
    report: dict[str, Any]
    phases: dict[str, float]


class Engine(Protocol):
    """Runs one half; called on every rank of the group with the same arguments."""

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran: ...


def make_engine(comm: Comm, target: Target, options: Options) -> Engine:
    ranks = options.size or comm.size
    if options.mode == "tile":
        return TileEngine(TileRunner(comm, target, ranks=ranks, gather=options.gather, fit=options.tiles == "fit"))
    return ExactEngine(comm, target, options)


class TileEngine:
    """The VAE's own tiles, spread over the ranks."""

    def __init__(self, runner: TileRunner) -> None:
        self._runner = runner

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran:
        outcome = self._runner.run(half, args, kwargs)
        report = {"tiles": outcome.tiles, "spread": outcome.spread, "tile_sizes": outcome.cut}
        return Ran(outcome.result, report, {"network": outcome.network_seconds, "gather": outcome.gather_seconds})


class ExactEngine:
    """Spatial shards with halo exchange; plans, probes once, runs."""

    def __init__(self, comm: Comm, target: Target, options: Options) -> None:
        self._comm, self._target, self._options = comm, target, options
        self._verified: set[tuple[str, tuple[int, int]]] = set()
        self._ratio: int | None = None

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran:
        started = time.perf_counter()
        plan = self._plan(half, picture)
        self._verify_once(half, plan, args, kwargs)
        probed = time.perf_counter()
        self._comm.traffic = Traffic()  # the probe's messages are not the call's
        call = functools.partial(self._target.run_untiled, half)
        outcome = run_on_group(self._comm, plan.shape, call, args, kwargs, plan.bounds, self._options.gather)
        report = {"shape": plan.shape, "bounds": plan.bounds, "extents": outcome.extents}
        phases = {
            "probe": probed - started,
            "network": outcome.network_seconds,
            "gather": outcome.gather_seconds,
        }
        return Ran(outcome.result, report, phases)

    def _plan(self, half: str, picture: Tensor) -> ShardPlan:
        ratio = 1
        if half == "encode":
            if self._ratio is None:
                self._ratio = compression(self._target, picture)
            ratio = self._ratio
        height, width = picture.shape[-2:]
        return plan_shards(height, width, ratio, self._options.size or self._comm.size, self._options.axis)

    def _verify_once(self, half: str, plan: ShardPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first time a half runs on a grid of this shape; every rank learns how it ended."""
        if not self._options.verify or plan.shape == (1, 1) or (half, plan.shape) in self._verified:
            return
        with together(self._comm):
            if self._comm.rank < plan.shape[0] * plan.shape[1]:
                ratio = self._ratio if half == "encode" and self._ratio else 1
                probe = make_probe(plan.shape, ratio, args, kwargs)
                verify(Mesh(self._comm, plan.shape), self._target, half, probe)
        self._verified.add((half, plan.shape))
