"""What a tiled call will do: its network calls and who runs them, found before anything is sent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from halovae.errors import TilingError
from halovae.record import NETWORKS, Recording, record
from halovae.target import Target
from halovae.tile.check import check_tiles
from halovae.tile.schedule import Schedule, assign, find_chains
from halovae.tile.settings import TileSettings, applied


@dataclass(frozen=True)
class TilePlan:
    """The calls of one encode or decode, who runs them, and the settings that make the VAE call them."""

    recording: Recording
    schedule: Schedule
    settings: dict[str, Any]
    tiles: TileSettings | None
    """Sizes and overlaps, where the VAE's names for them are known."""

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the largest tile as the network gets it."""
        crops = [call.inputs[0].shape for call in self.recording.calls]
        return max(crop[-2] for crop in crops), max(crop[-1] for crop in crops)


def make_plan(
    target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int, fit: bool = False
) -> TilePlan:
    """Find the calls of the VAE's own tiled method and spread them.

    Args:
        target: the VAE.
        half: "encode" or "decode".
        args: the call's arguments.
        kwargs: likewise.
        ranks: how many ranks may run tiles.
        fit: take smaller tiles where there are fewer than ranks.

    Raises:
        TilingError: the VAE has no tiles, or its tiled method fails or gives a wrong picture.
    """
    if "use_tiling" not in vars(target.vae) or not hasattr(target.vae, NETWORKS[half]):
        raise TilingError(f"{target.name}.{half} has no tiles: use mode='exact'")
    plan = _plan(target, half, args, kwargs, ranks, TileSettings.of(target.vae), {})
    if fit and plan.tiles and len(plan.schedule.chains) < ranks:
        plan = _fitted(target, half, args, kwargs, ranks, plan)
    return plan


def _plan(
    target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int,
    tiles: TileSettings | None, changes: dict[str, Any],
) -> TilePlan:  # fmt: skip
    settings = {"use_tiling": True, **changes}
    try:
        with applied(target.vae, settings):
            recording = record(target.vae, half, target.originals[half], args, kwargs)
            if not recording.calls:
                raise TilingError("never calls its network")
            check_tiles(target, half, args, kwargs, recording)
    except Exception as error:
        _raise_without_tiles(target, half, args, kwargs)
        problem = str(error) if isinstance(error, TilingError) else f"fails ({type(error).__name__}: {error})"
        raise TilingError(f"the tiled {half} of {target.name} {problem}. {_remedy(target, tiles)}") from error
    return TilePlan(recording, assign(find_chains(recording.calls), ranks), settings, tiles)


def _raise_without_tiles(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where the call fails without tiles too, it is not the tiles' fault: let the VAE's own error be seen."""
    with applied(target.vae, {"use_tiling": False}):
        try:
            record(target.vae, half, target.originals[half], args, kwargs)
        except NotImplementedError:
            return


def _remedy(target: Target, tiles: TileSettings | None) -> str:
    exact = "use mode='exact'"
    if tiles is None:
        return f"Use other tiles, or {exact}"
    return f"It is set to {tiles}: set sizes and overlaps that are multiples of {4 * tiles.ratio}, or {exact}"


def _fitted(
    target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int, plan: TilePlan
) -> TilePlan:
    """The plan with the least to do for the busiest rank, among smaller tiles with the same overlap."""
    assert plan.tiles
    best = plan
    for part in (3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4):
        tiles = _smaller(plan.tiles, part)
        if tiles == best.tiles or tiles is None:
            continue
        try:
            candidate = _plan(target, half, args, kwargs, ranks, tiles, tiles.changes(target.vae))
        except TilingError:
            continue  # these sizes don't suit the VAE's arithmetic
        if max(candidate.schedule.loads) < max(best.schedule.loads):
            best = candidate
    return best


def _smaller(tiles: TileSettings, part: float) -> TileSettings | None:
    """Tiles of a part of the size; None where the overlap would be more than half of them."""
    step = 4 * tiles.ratio
    size = tuple(round(part * size / step) * step for size in tiles.size)
    if any(new < 2 * max(overlap, tiles.ratio) for new, overlap in zip(size, tiles.overlap, strict=True)):
        return None
    return dataclasses.replace(tiles, size=size)
