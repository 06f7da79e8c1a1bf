"""One encode or decode in tiles: each rank runs its tiles, the results travel, and the VAE puts them together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from halovae.base.errors import DisagreementError, InputError, NotExactError, TilingError
from halovae.base.options import HALVES, Gather, gather_of
from halovae.base.timeline import span
from halovae.base.trees import contents, map_tensors, pictures_in, walk
from halovae.calls.dataflow import repeat
from halovae.calls.randomness import Generators
from halovae.calls.record import NETWORKS, Function, NetworkCall, answering
from halovae.calls.resumed import Held
from halovae.calls.state import unchanged
from halovae.calls.target import Target
from halovae.calls.time_stages import Stage
from halovae.comm import Comm
from halovae.comm.agreement import together
from halovae.kernels import autocast
from halovae.tiles.batches import ALONE, Batches, BatchVerdict
from halovae.tiles.blend import Blends
from halovae.tiles.move import Mover
from halovae.tiles.tile_plan import Planner, TilePlan, packed, unpacked
from halovae.tiles.tile_settings import applied, described
from halovae.tiles.tile_stages import StageCall, TileStages

MANY_FRAMES = 33
"""Of a clip that stands for one which comes in parts, where tiles are planned."""


@dataclass(frozen=True)
class TileOutcome:
    """A result, and how it was made."""

    result: Any
    plan: TilePlan
    network_seconds: float
    """Seconds in which this rank ran its tiles; earlier tiles were on their way meanwhile."""
    gather_seconds: float
    """Seconds of waiting for the last tiles, and of putting them together."""
    together: BatchVerdict
    """How many tiles went in one call of the network on this rank."""

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
        ranks: how many of the ranks run tiles; the others wait and share the result.
        gather: "all" or "first": who gets the whole result; or a mapping that says it for each half.
        fit: choose smaller tiles where some ranks would have none to run.
        same_bits: run tiles one by one, as the VAE itself does, also where several in one call are faster.

    Attributes:
        plans: by kind of call; the same on all ranks.

    Raises:
        InputError: `gather` is "shard": tiles overlap, so no rank has a part of its own.
    """

    def __init__(
        self, comm: Comm, target: Target, *, ranks: int, gather: Gather = "all", fit: bool = False,
        same_bits: bool = False,
    ) -> None:  # fmt: skip
        if "shard" in (gather_of(gather, half) for half in HALVES):
            raise InputError(
                "gather is 'shard', but tiles overlap and are blended: use 'all' or 'first', or mode='exact'"
            )
        self._comm, self._target, self._ranks, self._fit = comm, target, ranks, fit
        self._gather = gather
        self._blends = Blends(target.vae)
        self._planners: dict[str, Planner] = {}
        self._verdicts: dict[str, dict[Any, BatchVerdict]] = {half: {} for half in HALVES}
        self._same_bits = same_bits
        self.plans: dict[tuple[str, ...], TilePlan] = {}

    def run(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TileOutcome:
        """What the VAE alone gives, bit for bit where tiles run one by one. Called on every rank, with equal arguments.

        Raises:
            TilingError: the VAE's tiles can't be used.
            RankFailedError: another rank has failed.
        """
        plan = self.plan(half, args, kwargs)
        calls, mover = plan.recording.calls, self._mover(half, args, kwargs, plan)
        if plan.recording.writes and len(mover.holders) < self._comm.size:
            raise TilingError(f"{half} writes into its arguments, which ranks without its result can't do")
        return self._made(half, args, kwargs, plan, mover, TileCall(self._target, half, calls, mover, self._blends))

    def run_stage(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TileStages, stage: Stage, held: Held
    ) -> tuple[TileOutcome, Held]:  # fmt: skip
        """A stage of a clip that comes in parts: the new frames, and what this rank keeps for the next one.

        Raises:
            TilingError: the VAE's tiles can't be used.
            RankFailedError: another rank has failed.
        """
        plan = stages.plan(stage, self._ranks, held.owners)
        mover = self._mover(half, args, kwargs, plan)
        call = StageCall(self._target, half, stages, stage, held, mover, self._blends)
        outcome = self._made(half, args, kwargs, plan, mover, call)
        is_needed = stages.blends and self._comm.rank in mover.holders
        kept = tuple(mover.results[number] for number in stage.run) if is_needed else ()
        owners = tuple(map(plan.schedule.owner_of, stage.gives))
        return outcome, replace(call.held, results=kept, owners=owners)

    def stages(
        self, half: str, frame: torch.Tensor, more: tuple[Any, ...], kwargs: dict[str, Any],
        plan: TilePlan | None = None,
    ) -> TileStages:  # fmt: skip
        """The stages of clips of this size. No exchange.

        Args:
            plan: of such a clip; None: it comes in parts, and how long it will be is not known.

        Raises:
            NotExactError: there are none.
            TilingError: the VAE's tiles can't be used.
        """
        planner = self._planner(half)
        if plan is None:
            if self._fit:
                raise NotExactError("tiles that fit the ranks are chosen for a whole clip")
            plan = planner.plan((frame.expand(-1, -1, MANY_FRAMES, -1, -1), *more), kwargs)
        return TileStages(self._target, half, planner.checker, self._blends, frame, more, kwargs, plan)

    def _mover(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TilePlan) -> Mover:
        holders = range(self._comm.size if gather_of(self._gather, half) == "all" else 1)
        device = pictures_in((args, kwargs))[0].device
        return Mover(self._comm, plan.recording.calls, plan.schedule, holders, device)

    def _made(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TilePlan, mover: Mover,
        call: TileCall | StageCall,
    ) -> TileOutcome:  # fmt: skip
        device, vae = mover.device, self._target.vae
        generators = Generators(device, *args, *kwargs.values())
        # The method runs twice, and is to write once.
        given, named = map_tensors(torch.clone, (args, kwargs)) if plan.recording.writes else (args, kwargs)
        started = time.perf_counter()
        with applied(vae, plan.settings):
            if mine := plan.schedule.calls_of(self._comm.rank):
                # The VAE's own method runs once more, to put the results together.
                with Watched(self._comm), unchanged(vae, given, named) as before:
                    verdicts = None if self._same_bits else self._verdicts[half]
                    call.run(mine, given, named, verdicts)
                    if before.written():
                        raise TilingError(
                            f"{self._target.name}.{half} writes into tensors that it keeps: use mode='exact'"
                        )
            worked = time.perf_counter()
            mover.finish()
            if self._comm.rank in mover.holders:
                generators.rewind()
                with span("blend"):
                    result = call.gather(args, kwargs)
            else:
                result = map_tensors(lambda t: _nothing(t, device), plan.recording.result)
        verdicts = self._verdicts[half].values()
        together = max(verdicts, key=lambda verdict: (verdict.is_fast, verdict.tiles), default=ALONE)
        return TileOutcome(result, plan, worked - started, time.perf_counter() - worked, together)

    def plan(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        """Known after the first call with arguments of these shapes. Called on every rank.

        Raises:
            TilingError: the VAE's tiles can't be used.
        """
        given = repr([*map(_signature, walk((args, kwargs))), autocast.state()])
        key = half, described(self._target.vae), given
        if key not in self.plans:
            self.plans[key] = self._agreed(half, args, kwargs)
        return self.plans[key]

    def _agreed(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        """The first rank's plan: the others would find the same, in which time they may share its processor."""
        plan, problem = None, None
        if self._comm.rank == 0:
            try:
                plan = self._own_plan(half, args, kwargs)
            except Exception as error:  # Each rank is to find its own.
                problem = error
        everyone = self._comm.all_gather_object((described(self._target.vae), plan and packed(plan)))
        settings, found = everyone[0]
        for rank, (other, _) in enumerate(everyone):
            if other != settings:
                raise DisagreementError(
                    f"rank 0 and rank {rank} cut different tiles: enable_tiling() with the same sizes on all ranks"
                )
        if found:
            return plan or unpacked(found)
        with together(self._comm):
            if problem:
                raise problem
            return plan or self._own_plan(half, args, kwargs)

    def _own_plan(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        return self._planner(half).plan(args, kwargs)

    def _planner(self, half: str) -> Planner:
        if half not in self._planners:
            self._planners[half] = Planner(self._target, half, self._blends, self._ranks, self._fit)
        return self._planners[half]


def _signature(value: Any) -> Any:
    """What of an argument decides which tiles there are: its shape, or what it says if it is plain."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value if isinstance(value, (bool, int, float, str, type(None))) else (type(value), len(contents(value)))


def _nothing(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty((*tensor.shape[:-2], 0, 0)[: tensor.ndim], dtype=tensor.dtype, device=device)


# ---- the two passes through the VAE's own method: run the own tiles, then put all of them together ------------------


class _Finished(BaseException):
    """The network has answered its last call: what the VAE goes on to do is of no use yet."""


class Watched(TorchFunctionMode):
    """Within it, torch functions raise once another rank has failed: a tile can take minutes."""

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self._comm = comm

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._comm.check()
        return func(*args, **(kwargs or {}))


class TileCall:
    """One half in tiles, as one rank takes part in it, by the own method of a VAE that is set to use them."""

    def __init__(self, target: Target, half: str, calls: tuple[NetworkCall, ...], mover: Mover, blends: Blends) -> None:
        self._vae, self._half, self._method = target.vae, half, target.originals[half]
        self._calls, self._mover, self._blends, self._device = calls, mover, blends, mover.device

    def run(
        self, mine: set[int], args: tuple[Any, ...], kwargs: dict[str, Any],
        verdicts: dict[Any, BatchVerdict] | None = None,
    ) -> None:  # fmt: skip
        """Run the calls numbered `mine`; each chain's results leave as soon as they are complete.

        The VAE gets zeros for all of them: it is only asked what it calls next.

        Args:
            verdicts: which kinds of tiles go together, as far as it is known; None: all run by themselves.
        """
        network, device = getattr(self._vae, NETWORKS[self._half]), self._device
        batches = Batches(network, self._calls, mine, device, {} if verdicts is None else verdicts, verdicts is None)
        numbered = self._numbered()

        def work(*args: Any, **kwargs: Any) -> Any:
            number, call = next(numbered)
            real = None
            if number in mine:
                found = batches.run(number, args, kwargs)
                real = found.get(number)
                self._mover.take(found)
            else:
                repeat(call.draws, device)
            if number + 1 == len(self._calls):
                raise _Finished
            return call.result([spec.zeros(device) for spec in call.specs], real, device)

        with suppress(_Finished), answering(self._vae, self._half, work), self._blends.skipped():
            self._method(*args, **kwargs)
            raise TilingError(f"the VAE called its network less often than the {len(self._calls)} times planned")

    def gather(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the VAE makes of the results that have arrived: it blends, crops and puts them together."""
        numbered = self._numbered()

        def hand_out(*args: Any, **kwargs: Any) -> Any:
            number, call = next(numbered)
            repeat(call.draws, self._device)
            return call.result(self._mover.results.pop(number), device=self._device)

        with answering(self._vae, self._half, hand_out), self._blends.fast():
            return self._method(*args, **kwargs)

    def _numbered(self) -> Iterator[tuple[int, NetworkCall]]:
        yield from enumerate(self._calls)
        raise TilingError(f"the VAE called its network more often than the {len(self._calls)} times planned")
