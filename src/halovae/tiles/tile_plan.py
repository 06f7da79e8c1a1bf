"""What a tiled call will do: its network calls and who runs them, found before anything is sent."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import TilingError
from halovae.base.private_torch import pytree
from halovae.calls.record import NETWORKS, NetworkCall, Recording
from halovae.calls.target import Target, tile_grid
from halovae.tiles.blend import Blends
from halovae.tiles.check import Checker
from halovae.tiles.tile_settings import TileSettings, applied


@dataclass(frozen=True)
class TilePlan:
    """The calls of one encode or decode, who runs them, and the settings that make the VAE call them."""

    recording: Recording
    schedule: Schedule
    settings: dict[str, Any]
    tiles: TileSettings | None
    """Sizes and overlaps, where the VAE's names for them are known."""


class Planner:
    """Plans one half of a VAE.

    Args:
        fit: take smaller tiles where there are fewer than ranks.

    Raises:
        TilingError: the half has no tiles.
    """

    def __init__(self, target: Target, half: str, blends: Blends, ranks: int, fit: bool = False) -> None:
        if "use_tiling" not in vars(target.vae) or not hasattr(target.vae, NETWORKS[half]):
            raise TilingError(f"{target.name}.{half} has no tiles: use mode='exact'")
        self._target, self._half, self._ranks, self._fit = target, half, ranks, fit
        self.checker = Checker(target, half, blends)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        """Find the calls of the VAE's own tiled method and spread them.

        Raises:
            TilingError: the VAE's tiled method fails or gives a wrong picture.
        """
        tiles = TileSettings.of(self._target.vae)
        try:
            plan = self._plan(args, kwargs, tiles, {})
        except TilingError as error:
            remedy = self._remedy(args, kwargs, tiles)
            raise TilingError(f"the tiled {self._half} of {self._target.name} {error}: {remedy}") from error
        if not self._fit or tiles is None or len(plan.schedule.chains) >= self._ranks:
            return plan
        for part in (3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4):
            smaller = _smaller(tiles, part)
            if smaller in (None, tiles):
                continue
            try:
                candidate = self._plan(args, kwargs, smaller, smaller.changes(self._target.vae))
            except TilingError:
                continue  # these sizes don't suit the VAE's arithmetic
            if max(candidate.schedule.loads) < max(plan.schedule.loads):
                plan = candidate
        return plan

    def _plan(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tiles: TileSettings | None, changes: dict[str, Any]
    ) -> TilePlan:
        settings = {"use_tiling": True, **changes}
        try:
            with applied(self._target.vae, settings):
                recording = self.checker.recorded(args, kwargs)
                if not recording.calls:
                    raise TilingError("never calls its network")
                if recording.keeps:
                    raise TilingError("goes on with what the call before has left in it")
                self.checker.check(args, kwargs, recording)
        except Exception as error:
            if "meta device" in str(error):  # An operator that knows no shapes without values.
                raise TilingError(f"can't be planned on shapes alone ({error})") from error
            # Where the call fails without tiles too, the tiles are not to blame: this lets the VAE's own error be seen.
            self.checker.untiled(args, kwargs)
            if isinstance(error, TilingError):
                raise
            raise TilingError(f"fails ({type(error).__name__}: {error})") from error
        return TilePlan(recording, assign(find_chains(recording.calls), self._ranks), settings, tiles)

    def _remedy(self, args: tuple[Any, ...], kwargs: dict[str, Any], tiles: TileSettings | None) -> str:
        """Settings that work, found by trying."""
        vae = self._target.vae
        for candidate in _nearby(tiles) if tiles else []:
            try:
                plan = self._plan(args, kwargs, candidate, candidate.changes(vae))
            except TilingError:
                continue
            if len(plan.schedule.chains) == 1:
                continue  # a tile as large as the picture is no remedy
            changes = {k: v for k, v in candidate.changes(vae).items() if v != vars(vae)[k]}
            return "set " + ", ".join(f"vae.{name} = {value}" for name, value in changes.items())
        if not self._target.tiles_only:
            return "use mode='exact'"
        grid, words = tile_grid(self._target.vae), ("frames", "rows", "columns")
        sizes = " and ".join(f"{tile} + {step} * n {word}" for (tile, step), word in zip(grid, words, strict=False))
        return f"it runs in tiles only, and covers {sizes}" if grid else "it runs in tiles only"


def _nearby(tiles: TileSettings) -> list[TileSettings]:
    """Tiles of about the same size whose latents come out whole."""
    step = 4 * tiles.ratio
    (height, width), (down, across) = tiles.size, tiles.overlap
    whole = _round(height, step), _round(width, step)
    return [
        tiles,
        dataclasses.replace(tiles, overlap=(_round(down, tiles.ratio), _round(across, tiles.ratio))),
        dataclasses.replace(tiles, size=whole, overlap=(whole[0] // 4, whole[1] // 4)),
    ]


def _round(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


def _smaller(tiles: TileSettings, part: float) -> TileSettings | None:
    """Tiles of a part of the size; None where the overlap would be more than half of them."""
    height, width = (_round(part * size, tiles.ratio) for size in tiles.size)
    if height < 2 * max(tiles.overlap[0], tiles.ratio) or width < 2 * max(tiles.overlap[1], tiles.ratio):
        return None
    return dataclasses.replace(tiles, size=(height, width))


# ---- a plan for other ranks ------------------------------------------------------------------------------------------


class _Packer(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Generator) or (isinstance(obj, Tensor) and not obj.is_meta):
            raise pickle.PicklingError("it is this rank's own")
        if isinstance(obj, Tensor):
            return _shape_of, (tuple(obj.shape), obj.stride(), obj.dtype)
        if isinstance(obj, pytree.TreeSpec) and obj.is_leaf():  # Pickle makes one in a way that torch warns of.
            return pytree.tree_structure, (0,)
        return NotImplemented


def _shape_of(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def packed(plan: TilePlan) -> bytes | None:
    """What another rank takes for its own plan; None where a rank's own things are in it."""
    file = io.BytesIO()
    try:
        _Packer(file).dump(plan)
    except Exception:  # Whatever a stranger's objects raise.
        return None
    return file.getvalue()


def unpacked(words: bytes) -> TilePlan:
    return pickle.loads(words)


# ---- which rank runs which tiles: from shapes alone ------------------------------------------------------------------


@dataclass(frozen=True)
class TileChain:
    """Calls that share a cache, in order: they run on one rank."""

    calls: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Schedule:
    """Who runs what."""

    chains: tuple[TileChain, ...]
    """In the VAE's own order."""
    owners: tuple[int, ...]
    """The rank of each chain."""
    loads: tuple[int, ...]
    """Sum of costs of each rank at work."""

    @property
    def spread(self) -> float:
        """Largest over mean load: 1.0 is a perfect balance."""
        return max(self.loads) * len(self.loads) / max(1, sum(self.loads))

    @property
    def rounds(self) -> int:
        """Most chains on one rank."""
        return max((len(self.of(rank)) for rank in set(self.owners)), default=0)

    def of(self, rank: int) -> list[TileChain]:
        """A rank's chains, in the order in which they get ready."""
        mine = [chain for chain, owner in zip(self.chains, self.owners, strict=True) if owner == rank]
        return sorted(mine, key=lambda chain: chain.calls[-1])

    def owner_of(self, call: int) -> int:
        """The rank that runs a call."""
        return next(o for chain, o in zip(self.chains, self.owners, strict=True) if call in chain.calls)

    def calls_of(self, rank: int) -> set[int]:
        return {call for chain in self.of(rank) for call in chain.calls}


def find_chains(calls: Sequence[NetworkCall]) -> tuple[TileChain, ...]:
    """Group calls that read each other's caches."""
    first = list(range(len(calls)))

    def root(call: int) -> int:
        while first[call] != call:
            call = first[call]
        return call

    for call, known in enumerate(calls):
        for earlier in known.needs:
            roots = sorted((root(call), root(earlier)))
            first[roots[1]] = roots[0]
    members: dict[int, list[int]] = {}
    for call in range(len(calls)):
        members.setdefault(root(call), []).append(call)
    return tuple(TileChain(tuple(group), sum(calls[call].cost for call in group)) for group in members.values())


def assign(chains: Sequence[TileChain], ranks: int, known: Mapping[int, int] | None = None) -> Schedule:
    """Give the longest chain to the rank with the least to do, then the next.

    Args:
        ranks: how many ranks may work; those beyond the number of chains get nothing.
        known: ranks of chains that go on where they have been so far.
    """
    known = known or {}
    loads = [0] * ranks
    owners = [0] * len(chains)
    for number in sorted(range(len(chains)), key=lambda n: (n not in known, -chains[n].cost, n)):
        owners[number] = known.get(number, loads.index(min(loads)))
        loads[owners[number]] += chains[number].cost
    return Schedule(tuple(chains), tuple(owners), tuple(loads))
