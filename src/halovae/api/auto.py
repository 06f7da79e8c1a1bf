"""`mode="auto"`: exact shards or the VAE's own tiles, whichever is predicted to be faster on this link.

Where that runs out of memory on some rank, all ranks go on to the next way that takes less.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from halovae.api.engines import Engine, ExactEngine, Ran, TileEngine
from halovae.base import timeline
from halovae.base.errors import HalovaeError, InputError, RankFailedError, TilingError
from halovae.base.files import first_line
from halovae.base.memory import is_shortage
from halovae.base.options import HALVES, AllOptions, gather_of
from halovae.base.trees import pictures_in
from halovae.calls.target import Target
from halovae.comm import Comm, Traffic
from halovae.comm.agreement import one_call
from halovae.comm.bandwidth import LinkSpeed, measure
from halovae.kernels import autocast
from halovae.predict.measured_rates import MeasuredSpeed
from halovae.predict.predictor import Predictor
from halovae.tiles.tile_settings import described

LOG = logging.getLogger("halovae")


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
        self._comm, self._target, self._options = comm, target, options
        self._may_tile = "shard" not in (gather_of(options.gather, half) for half in HALVES)
        self._exact = ExactEngine(comm, target, replace(options, mode="exact"))
        frugal = replace(options, mode="exact", frames_per_call=1, graphs=False)
        # From the one that takes most memory to the one that takes least.
        self._ways: dict[str, ExactEngine | TileEngine] = {
            "exact": self._exact,
            "exact step by step": ExactEngine(comm, target, frugal),
            "exact on all ranks": ExactEngine(comm, target, replace(frugal, size=None, axis="auto")),
        }
        if self._may_tile:
            self._ways["tile"] = TileEngine(comm, target, replace(options, mode="tile"))
            self._ways["smaller tiles"] = TileEngine(comm, target, replace(options, mode="tile", tiles="fit"))
        self._speeds: dict[Any, MeasuredSpeed] = {}
        self._choices: dict[Any, Choice] = {}
        self._retreats = 0

    def run(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran:
        started = time.perf_counter()
        key = self._key(half, picture)
        if key not in self._choices:
            self._choices[key] = Choice(*self._choose(half, picture, args, kwargs))
            LOG.info("%s of %s: %s", half, self._target.name, self._choices[key])
            self._comm.traffic = Traffic()  # what was sent to measure the link is not the call's
        choice = self._choices[key]
        chosen = time.perf_counter()
        timeline.note("probe", started, chosen)
        ran = self._ways[choice.way].run(half, picture, args, kwargs)
        report = ran.report | {"choice": str(choice)}
        return replace(ran, report=report, phases={"choose": chosen - started, **ran.phases})

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
        self._exact.free()

    def retreat(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> bool:
        """Every rank comes here, whatever it failed by; they agree on what to do by an exchange."""
        said = None if isinstance(error, RankFailedError) else (is_shortage(error), _words(error))
        try:
            with one_call(self._comm):  # All of it: who is interrupted here tells those that wait.
                self.free()
                picture = next(iter(pictures_in((args, kwargs))), None)
                key = None if picture is None else self._key(half, picture)
                choice = self._choices.get(key)
                everyone = self._comm.all_gather_object((choice, said))
                problems = {rank: problem for rank, (_, problem) in enumerate(everyone) if problem}
                if picture is None or choice is None or any(other != choice for other, _ in everyone):
                    return False
                if not problems or not all(shortage for shortage, _ in problems.values()):
                    return False
                leaner = next(self._leaner(choice.way, half, picture, args, kwargs), None)
        except Exception:  # A rank has died: the first error says more.
            return False
        if leaner is None:
            return False
        rank, (_, words) = next(iter(problems.items()))
        now = Choice(leaner, f"{choice.way} was too large for rank {rank} ({words})")
        self._choices[key] = now
        self._retreats += 1
        LOG.warning("%s of %s: %s", half, self._target.name, now)
        return True

    def _leaner(
        self, way: str, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[str]:  # fmt: skip
        """Ways that take less memory, the next one first."""
        engine, names = self._ways[way], list(self._ways)
        for name in names[names.index(way) + 1 :]:
            other = self._ways[name]
            if isinstance(other, ExactEngine):
                assert isinstance(engine, ExactEngine), "exact ways come first"
                more_ranks = prod(other.plan(half, picture).shape) > prod(engine.plan(half, picture).shape)
                if more_ranks or engine.may_merge(half, picture, args, kwargs):
                    yield name
                continue
            try:
                settings = other.settings(half, args, kwargs)
            except TilingError:
                continue
            if not isinstance(engine, TileEngine) or settings != engine.settings(half, args, kwargs):
                yield name

    def _choose(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, str]:  # fmt: skip
        """The mode and the reason, as the first rank finds them."""
        if self._may_tile and self._target.comes_tiled:
            return "tile", "the VAE comes tiled, and its tiles are its own result"
        if self._comm.size == 1:
            return "exact", "one rank sends nothing"
        if not self._may_tile:
            return "exact", "tiles overlap, so they can't stay in shards"
        ratio = self._exact.ratio(half, picture)
        link = measure(self._comm, picture.device)
        found: tuple[str, str] | None = None
        if self._comm.rank == 0:
            found = self._predict(picture, link, half, args, kwargs, ratio)
        mode, why = self._comm.all_gather_object(found)[0]
        return mode, f"{why}; link {link}"

    def _predict(
        self, picture: Tensor, link: LinkSpeed, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], ratio: int
    ) -> tuple[str, str]:
        kind = picture.device, picture.dtype
        try:
            if kind not in self._speeds:
                self._speeds[kind] = MeasuredSpeed(*kind)
            predictor = Predictor(self._target, self._speeds[kind], link, self._options.frames_per_call)
            return self._compare(predictor, half, args, kwargs, ratio)
        except Exception as error:
            if not is_shortage(error):
                raise
            return "exact", f"no memory is left for trials ({first_line(error)})"

    def _compare(
        self, predictor: Predictor, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], ratio: int
    ) -> tuple[str, str]:
        """On one rank; what can't be predicted is told and not raised, since the others wait for the answer."""
        options = self._options
        ranks, gather = options.size or self._comm.size, gather_of(options.gather, half)
        seconds: dict[str, float] = {}
        refusals: dict[str, str] = {}
        for mode, call in {
            "exact": lambda: predictor.exact(
                half, args, kwargs, ranks=ranks, axis=options.axis, ratio=ratio, gather=gather
            ),
            "tile": lambda: predictor.tile(half, args, kwargs, ranks=ranks, gather=gather),
        }.items():
            try:
                seconds[mode] = call().seconds
            except InputError as error:
                return "exact", f"no prediction is possible ({error})"
            except HalovaeError as error:
                refusals[mode] = str(error)
        if len(seconds) < 2:
            mode = next(iter(seconds), "exact")
            return mode, f"the other way is refused ({next(iter(refusals.values()))})"
        mode = min(seconds, key=lambda name: seconds[name])
        return mode, f"predicted exact {seconds['exact']:.3f} s, tile {seconds['tile']:.3f} s"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
