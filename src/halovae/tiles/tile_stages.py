"""A clip in tiles that comes in parts: each part makes the calls of all tiles that its frames need, spread over ranks.

The stages are those of the VAE's own tiled method, found on a picture of as many tiles, but small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import NotExactError, TilingError
from halovae.calls.record import NETWORKS, NetworkCall, Recording
from halovae.calls.resumed import Held, Resumed, new_frames
from halovae.calls.target import Target
from halovae.calls.time_stages import Part, Position, Stage, TimeStages, in_time
from halovae.tiles.batches import Batches, BatchVerdict
from halovae.tiles.blend import Blends
from halovae.tiles.check import Checker
from halovae.tiles.move import Mover
from halovae.tiles.tile_plan import TileChain, TilePlan, assign, find_chains
from halovae.tiles.tile_settings import TileSettings, applied

_LATENTS = (2, 3, 4, 5, 6, 8, 12)
"""Height and width of small tiles that are tried."""
_FRAMES = (9, 1)
"""Of the clips that tell whether there are as many; some VAEs take no single latent frame."""


class TileStages(TimeStages):
    """Finds the stages of one half in tiles, for clips of one size.

    Args:
        frame: one frame of the clip; of these only the shape counts.
        more: what the half gets after the clip.
        kwargs: of the half.
        plan: of a clip of this size.

    Raises:
        NotExactError: the tiles can't be made small.
    """

    def __init__(
        self, target: Target, half: str, checker: Checker, blends: Blends, frame: Tensor, more: tuple[Any, ...],
        kwargs: dict[str, Any], plan: TilePlan,
    ) -> None:  # fmt: skip
        self.settings, self._tiles = plan.settings, plan.tiles
        self._target, self._checker = target, checker
        few, small, changes = self._smaller(half, frame, more, kwargs)

        def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
            is_small = args[0].shape[-2:] in (few.shape[-2:], small.shape[-2:])
            return self._calls_of(args, kwargs, changes if is_small else {})

        def method(*args: Any, **kwargs: Any) -> Any:
            with applied(target.vae, self.settings | changes), blends.fast():
                return target.originals[half](*args, **kwargs)

        super().__init__(target.vae, half, method, record, frame, small, more, kwargs)
        self._few = TimeStages(target.vae, half, method, record, few, few, more, kwargs)
        """Of a picture of few tiles: with all of them, trying clips of each length would take long."""
        self._alike = {self.start: self._few.start}
        """Its positions by those of the clip."""

    def short(self, total: int | None) -> int | None:
        return self._few.short(total)

    def _next_step(self, place: Position, total: int | None) -> Part | None:
        step = self._few.step(self._alike[place], total)
        if step is None:
            return None
        self._least = step[1].fresh
        found = self.part(place, step[0], total)
        self._least = 0
        if found is None:
            return None
        self._alike[found[1]] = step[2]
        return step[0], *found

    def _lengths(self, frames: int) -> Sequence[int]:
        """The others were tried with few tiles."""
        lengths = super()._lengths(frames)
        return lengths[0], lengths[-1]

    def plan(self, stage: Stage, ranks: int, owners: tuple[int, ...]) -> TilePlan:
        """Who runs which calls of a stage.

        Args:
            owners: the ranks that have the caches which the stage before gives.
        """
        taken = {number: owners[place] for number, place in stage.takes}
        chains: list[TileChain] = []
        known: dict[int, int] = {}
        for chain in find_chains(stage.calls):
            if run := tuple(number for number in chain.calls if number in stage.run):
                known |= {len(chains): taken[number] for number in chain.calls if number in taken}
                chains.append(TileChain(run, sum(stage.calls[number].cost for number in run)))
        recording = Recording(stage.calls, new_frames(stage, stage.result), keeps=False, writes=False)
        return TilePlan(recording, assign(chains, ranks, known), self.settings, self._tiles)

    def _smaller(
        self, half: str, frame: Tensor, more: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A small picture of few tiles, one of as many as the frame has, and the settings for these."""
        if self._tiles is None:
            raise NotExactError("its names for sizes of tiles are not known")
        ratio = 1 if half == "decode" else self._tiles.ratio
        for tiles, *sizes in _candidates(self._tiles, [ceil(length / ratio) for length in frame.shape[-2:]]):
            few, small = (
                frame[..., :1, :1].expand(*frame.shape[:-2], *(ratio * length for length in size)) for size in sizes
            )
            changes = tiles.changes(self._target.vae)
            if frame.shape[-2:] in (few.shape[-2:], small.shape[-2:]):  # It is as small itself.
                few, small, changes = frame, frame, {}
            for count in _FRAMES:
                clips = (picture.expand(-1, -1, count, -1, -1) for picture in (frame, small))
                try:
                    found = [
                        self._calls_of((clip, *more), kwargs, given).calls
                        for clip, given in zip(clips, ({}, changes), strict=True)
                    ]
                except Exception:  # Whatever a model's code raises for a size that does not suit it.
                    continue
                if [*map(in_time, found[0])] == [*map(in_time, found[1])]:
                    return few, small, changes
        raise NotExactError("no small picture has as many tiles")

    def _calls_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str, Any]) -> Recording:
        with applied(self._target.vae, self.settings | changes):
            return self._checker.recorded(args, kwargs)


def _candidates(tiles: TileSettings, picture: list[int]) -> Iterator[tuple[TileSettings, list[int], tuple[int, ...]]]:
    """Smaller tiles, and sizes in latents of pictures: with two tiles or few, and with as many as there may be."""
    sizes = [length / tiles.ratio for length in tiles.size]
    overlaps = [length / tiles.ratio for length in tiles.overlap]
    for latents in _LATENTS:
        size = [min(latents, ceil(length)) for length in sizes]
        overlap = [max(1, round(o * new / old)) if o else 0 for o, old, new in zip(overlaps, sizes, size, strict=True)]
        steps = [new - o for new, o in zip(size, overlap, strict=True)]
        if min(steps) < 1:
            continue
        found: list[list[int]] = []
        for length, old, o, step, lap in zip(picture, sizes, overlaps, steps, overlap, strict=True):
            # Tiles begin at each step of the picture, or only where there is something left to cover.
            covering, beginning = max(1, ceil((length - o) / (old - o))), ceil(length / (old - o))
            found.append([*dict.fromkeys((lap + covering * step, beginning * step))])
        smaller = replace(tiles, size=_pixels(size, tiles), overlap=_pixels(overlap, tiles))
        for chosen in product(*found):
            few, axis = [min(pair) for pair in zip(chosen, size, strict=True)], int(chosen[1] > size[1])
            few[axis] = min(chosen[axis], size[axis] + steps[axis])
            yield smaller, few, chosen


def _pixels(latents: list[int], tiles: TileSettings) -> tuple[int, int]:
    return latents[0] * tiles.ratio, latents[1] * tiles.ratio


class _Finished(BaseException):
    """The network has answered its last call here: what the VAE goes on to do is of no use yet."""


class StageCall(Resumed):
    """A stage in tiles, as one rank takes part in it.

    The VAE's method runs twice: first it is asked what it calls, with zeros for all results, and then it puts together
    what has arrived.

    Args:
        mover: of the calls of this stage.
    """

    def __init__(
        self, target: Target, half: str, stages: TileStages, stage: Stage, held: Held, mover: Mover, blends: Blends
    ) -> None:  # fmt: skip
        super().__init__(target.vae, half, stages, stage, held)
        self._method, self._mover, self._blends = target.originals[half], mover, blends
        self.held = Held([None] * len(stage.gives))  # Of a rank without a tile.

    def run(
        self, mine: set[int], args: tuple[Any, ...], kwargs: dict[str, Any],
        verdicts: dict[Any, BatchVerdict] | None = None,
    ) -> None:  # fmt: skip
        """As `TileCall.run`."""
        device, network = args[0].device, getattr(self._vae, NETWORKS[self._half])
        known = {} if verdicts is None else verdicts
        self._batches = Batches(
            network, self.stage.calls, mine, device, known, verdicts is None, self.stage.gives
        )  # fmt: skip
        self._here = {number for number, place in self.stage.takes if self._before.caches[place] is not None}
        self._mine = mine
        with suppress(_Finished), self._blends.skipped():
            self._run(self._method, args, kwargs)
            raise TilingError(f"the VAE called its network less often than the {len(self.stage.calls)} times planned")
        self.held = self._left()

    def gather(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The new frames, of the results that have arrived."""
        stage, results = self.stage, self._mover.results
        there = {number: results[number] for number in stage.run}
        there |= {number: self._before.results[place] for number, place in stage.holds}
        holds = tuple((number, place) for place, number in enumerate(there))
        putting = replace(stage, run=(), takes=(), gives=(), holds=holds)
        with self._blends.fast():
            made = Resumed(self._vae, self._half, self.stages, putting, Held(results=tuple(there.values())))
            return made(self._method, *args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        number, call = self._next()
        others = None
        if number in self._mine:
            others = self._real(number, call, args, kwargs)
        elif number in self._here:
            others = self._gone_on(number, args, kwargs)
        if number == max(self._mine):
            raise _Finished
        return _zeros(call, others, self._device)

    def _called(self, number: int, args: Any, kwargs: Any) -> Any:
        found = self._batches.run(number, args, kwargs)
        self._mover.take(found)
        return found[number] if number in found else _zeros(self.stage.calls[number], None, self._device)

    def _keep(self, used: list[Tensor]) -> None:
        """The results are the mover's."""


def _zeros(call: NetworkCall, others: Any, device: torch.device) -> Any:
    return call.result([spec.zeros(device) for spec in call.specs], others, device)
