"""Which engine runs the halves of a VAE; for `mode="auto"`: exact shards, and tiles where that is refused.

Where memory runs out on some rank, all ranks go on to the next way that takes less.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from halovae.api.engine import Emit, Engine, Given, Ran
from halovae.api.exact_engine import ExactEngine
from halovae.api.tile_engine import TileEngine
from halovae.base.errors import NotExactError, RankFailedError, TilingError
from halovae.base.files import first_line
from halovae.base.memory import drop_frames, is_shortage
from halovae.base.options import HALVES, AllOptions, gather_of
from halovae.base.trees import pictures_in
from halovae.calls.resumed import Held
from halovae.calls.target import Target
from halovae.calls.time_stages import Stage, TimeStages
from halovae.comm import Comm
from halovae.comm.agreement import one_call
from halovae.kernels import autocast
from halovae.tiles.tile_settings import described

LOG = logging.getLogger("halovae")
_SHORT, _REFUSED, _OTHER = "short of memory", "refused", "other"


def make_engine(comm: Comm, target: Target, options: AllOptions) -> Engine:
    """What runs calls in a mode."""
    kinds = {"tile": TileEngine, "auto": AutoEngine}
    return kinds.get(options.mode or "", ExactEngine)(comm, target, options)


@dataclass(frozen=True)
class Choice:
    """A way to run calls of one kind."""

    way: str
    """A name in `AutoEngine`'s ways."""
    why: str

    def __str__(self) -> str:
        return f"{self.way}: {self.why}"


class AutoEngine(Engine):
    """Chooses at the first call of each half with pictures of some size; the same on every rank."""

    def __init__(self, comm: Comm, target: Target, options: AllOptions) -> None:
        self._comm, self._target = comm, target
        frugal = replace(options, mode="exact", frames_per_call=1, graphs=False, alone=False)
        # From the one that takes most memory to the one that takes least.
        self._ways: dict[str, ExactEngine | TileEngine] = {
            "exact": ExactEngine(comm, target, replace(options, mode="exact")),
            "exact step by step": ExactEngine(comm, target, frugal),
            "exact on all ranks": ExactEngine(comm, target, replace(frugal, size=None, axis="auto")),
        }
        if "shard" not in (gather_of(options.gather, half) for half in HALVES):  # Tiles overlap.
            self._ways["tile"] = TileEngine(comm, target, replace(options, mode="tile"))
            self._ways["smaller tiles"] = TileEngine(comm, target, replace(options, mode="tile", tiles="fit"))
        self._choices: dict[Any, Choice] = {}
        self._retreats = 0

    def run(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit | None = None
    ) -> Ran:  # fmt: skip
        choice = self._choice(half, picture)
        ran = self._ways[choice.way].run(half, picture, args, kwargs, emit)
        return replace(ran, report=replace(ran.report, choice=str(choice)))

    def stages(self, half: str, frame: Tensor, kwargs: dict[str, Any]) -> TimeStages:
        return self._ways[self._choice(half, frame).way].stages(half, frame, kwargs)

    def run_stage(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TimeStages, stage: Stage, held: Held
    ) -> tuple[Ran, Held]:
        choice = self._choice(half, args[0][:, :, :1])
        ran, held = self._ways[choice.way].run_stage(half, args, kwargs, stages, stage, held)
        return replace(ran, report=replace(ran.report, choice=str(choice))), held

    def _choice(self, half: str, picture: Tensor) -> Choice:
        key = self._key(half, picture)
        if key not in self._choices:
            tiled = "tile" in self._ways and self._target.comes_tiled
            why = (
                "it gives the un-tiled result" if not tiled else "the VAE runs in tiles only" if self._target.tiles_only
                else "the VAE comes tiled, and its tiles are its own result"
            )  # fmt: skip
            self._choices[key] = Choice("tile" if tiled else "exact", why)
            LOG.info("%s of %s: %s", half, self._target.name, self._choices[key])
        return self._choices[key]

    def _key(self, half: str, picture: Tensor) -> Any:
        kind = tuple(picture.shape), picture.dtype, picture.device, autocast.state()
        return half, *kind, described(self._target.vae)

    def settled(self) -> int:
        return self._retreats + len(self._choices) + sum(engine.settled() for engine in self._ways.values())

    def forget(self) -> None:
        self._retreats = 0
        self._choices.clear()
        for engine in self._ways.values():
            engine.forget()

    def free(self) -> None:
        self._ways["exact"].free()

    def retreat(self, half: str, given: Given, error: BaseException, is_out: bool = False) -> bool:
        """Every rank comes here, whatever it failed by; they agree on what to do by an exchange."""
        said = None if isinstance(error, RankFailedError) else _told(error)
        try:
            with one_call(self._comm):  # All of it: who is interrupted here tells those that wait.
                self.free()
                if said is None or said[0] == _SHORT:
                    drop_frames(error)
                args, kwargs = given()
                picture = next(iter(pictures_in((args, kwargs))), None)
                key = None if picture is None else self._key(half, picture)
                choice = self._choices.get(key)
                engine = self._ways[choice.way] if choice else None
                contest = engine.contest if isinstance(engine, ExactEngine) else None
                mine = choice, said, is_out, contest is not None and contest.is_at_risk
                everyone = self._comm.all_gather_object(mine)
                problems = {rank: problem for rank, (_, problem, *_) in enumerate(everyone) if problem}
                if picture is None or choice is None or any(other != choice or out for other, _, out, _ in everyone):
                    return False
                kinds = {kind for kind, _ in problems.values()}
                if not kinds or _OTHER in kinds:
                    return False
                if _SHORT in kinds and contest and all(risk for *_, risk in everyone):
                    return contest.give_up()
                next_ways = self._tiles if _REFUSED in kinds else self._leaner
                way = next(next_ways(choice.way, half, args, kwargs), None)
        except Exception:  # A rank has died: the first error says more.
            return False
        if way is None:
            return False
        rank, (kind, words) = next(iter(problems.items()))
        what = f"too large for rank {rank}" if kind == _SHORT else "refused"
        self._choices[key] = Choice(way, f"{choice.way} was {what} ({words})")
        self._retreats += 1
        LOG.warning("%s of %s: %s", half, self._target.name, self._choices[key])
        return True

    def _leaner(self, way: str, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        """Ways that take less memory, the next one first."""
        engine, names = self._ways[way], list(self._ways)
        if isinstance(engine, ExactEngine):
            plan, merges = engine.outlook(half, args, kwargs)
            for name in names[names.index(way) + 1 :]:
                other = self._ways[name]
                if not isinstance(other, ExactEngine):
                    break
                if merges or prod(other.outlook(half, args, kwargs)[0].shape) > prod(plan.shape):
                    yield name
        yield from self._tiles(way, half, args, kwargs)

    def _tiles(self, way: str, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        """Ways by tiles that are other ones than this one, the largest tiles first."""
        engine, names = self._ways[way], list(self._ways)
        for name in names[names.index(way) + 1 :]:
            other = self._ways[name]
            if isinstance(other, ExactEngine):
                continue
            try:
                settings = other.settings(half, args, kwargs)
            except TilingError:
                continue
            if not isinstance(engine, TileEngine) or settings != engine.settings(half, args, kwargs):
                yield name


def _told(error: BaseException) -> tuple[str, str]:
    """What kind of failure it is on this rank, and its words."""
    refused = isinstance(error, NotExactError)
    kind = _REFUSED if refused else _SHORT if is_shortage(error) else _OTHER
    cause = error.__cause__ if refused and isinstance(error.__cause__, NotExactError) else error  # Without advice.
    return kind, f"{type(cause).__name__}: {first_line(cause)}"
