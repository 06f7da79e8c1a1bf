"""One encode or decode in tiles: each rank runs its tiles, the results travel, and the VAE puts them together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from halovae.base.errors import DisagreementError, InputError, TilingError
from halovae.base.options import HALVES, Gather, gather_of
from halovae.base.timeline import span
from halovae.base.trees import contents, map_tensors, pictures_in, walk
from halovae.calls.randomness import Generators
from halovae.calls.state import unchanged
from halovae.calls.target import Target
from halovae.comm import Comm
from halovae.comm.agreement import together
from halovae.kernels import autocast
from halovae.tiles.blend import Blends
from halovae.tiles.move import Mover
from halovae.tiles.tile_plan import Planner, TilePlan
from halovae.tiles.tile_settings import applied, described
from halovae.tiles.work import Watched, put_together, run_own_tiles


@dataclass(frozen=True)
class TileOutcome:
    """A result, and how it was made."""

    result: Any
    plan: TilePlan
    network_seconds: float
    """Seconds in which this rank ran its tiles; earlier tiles were on their way meanwhile."""
    gather_seconds: float
    """Seconds of waiting for the last tiles, and of putting them together."""

    @property
    def tiles(self) -> int:
        """How many were run, each with all its frames."""
        return len(self.plan.schedule.chains)

    @property
    def spread(self) -> float:
        """Largest over mean load of the ranks."""
        return self.plan.schedule.spread

    @property
    def cut(self) -> str:
        """Sizes and overlaps, as text."""
        return str(self.plan.tiles or "tiles of the VAE's own choice")


class TileRunner:
    """Runs a VAE's halves in its own tiles, on the ranks of a group. Every rank of the group makes one.

    Args:
        comm: the group.
        target: the VAE.
        ranks: how many of the ranks run tiles; the others wait and share the result.
        gather: "all" or "first": who gets the whole result; or a mapping that says it for each half.
        fit: choose smaller tiles where some ranks would have none to run.

    Attributes:
        plans: by kind of call; the same on all ranks.

    Raises:
        InputError: `gather` is "shard": tiles overlap, so no rank has a part of its own.
    """

    def __init__(self, comm: Comm, target: Target, *, ranks: int, gather: Gather = "all", fit: bool = False) -> None:
        if "shard" in (gather_of(gather, half) for half in HALVES):
            raise InputError(
                "gather is 'shard', but tiles overlap and are blended: use 'all' or 'first', or mode='exact'"
            )
        self._comm, self._target, self._ranks, self._fit = comm, target, ranks, fit
        self._gather = gather
        self._blends = Blends(target.vae)
        self._planners: dict[str, Planner] = {}
        self.plans: dict[tuple[str, ...], TilePlan] = {}

    def run(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TileOutcome:
        """The tiled encode or decode, bit for bit what the VAE alone gives. Called on every rank, with equal arguments.

        Raises:
            TilingError: the VAE's tiles can't be used.
            RankFailedError: another rank has failed.
        """
        device = pictures_in((args, kwargs))[0].device
        plan = self.plan(half, args, kwargs)
        vae, method, calls = self._target.vae, self._target.originals[half], plan.recording.calls
        generators = Generators(device, *args, *kwargs.values())
        holders = range(self._comm.size if gather_of(self._gather, half) == "all" else 1)
        mover = Mover(self._comm, calls, plan.schedule, holders, device)
        writes = plan.recording.writes
        if writes and len(holders) < self._comm.size:
            raise TilingError(f"{half} writes into its arguments, which ranks without its result can't do")
        # The method runs twice, and is to write once.
        given, named = map_tensors(torch.clone, (args, kwargs)) if writes else (args, kwargs)
        started = time.perf_counter()
        with applied(vae, plan.settings):
            if mine := plan.schedule.calls_of(self._comm.rank):
                # The VAE's own method runs once more, to put the results together.
                with Watched(self._comm), unchanged(vae, given, named) as before:
                    run_own_tiles(vae, half, method, given, named, calls, mine, mover, self._blends, device)
                    if before.written():
                        raise TilingError(
                            f"{self._target.name}.{half} writes into tensors that it keeps: use mode='exact'"
                        )
            worked = time.perf_counter()
            mover.finish()
            if self._comm.rank in holders:
                generators.rewind()
                with span("blend"):
                    result = put_together(vae, half, method, args, kwargs, calls, mover, self._blends, device)
            else:
                result = map_tensors(lambda t: _nothing(t, device), plan.recording.result)
        return TileOutcome(result, plan, worked - started, time.perf_counter() - worked)

    def plan(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        """Known after the first call with arguments of these shapes. Called on every rank.

        Raises:
            TilingError: the VAE's tiles can't be used.
        """
        given = repr([*map(_signature, walk((args, kwargs))), autocast.state()])
        key = half, described(self._target.vae), given
        if key not in self.plans:
            with together(self._comm):
                if half not in self._planners:
                    self._planners[half] = Planner(self._target, half, self._blends, self._ranks, self._fit)
                plan = self._planners[half].plan(args, kwargs)
            schedules = self._comm.all_gather_object(repr(plan.schedule))
            if len(set(schedules)) > 1:
                rank = next(rank for rank, other in enumerate(schedules) if other != schedules[0])
                raise DisagreementError(
                    f"rank 0 and rank {rank} cut different tiles: enable_tiling() with the same sizes on all ranks"
                )
            self.plans[key] = plan
        return self.plans[key]


def _signature(value: Any) -> Any:
    """What of an argument decides which tiles there are: its shape, or what it says if it is plain."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value if isinstance(value, (bool, int, float, str, type(None))) else (type(value), len(contents(value)))


def _nothing(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty((*tensor.shape[:-2], 0, 0)[: tensor.ndim], dtype=tensor.dtype, device=device)
