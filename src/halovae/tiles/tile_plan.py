"""What a tiled call will do: its network calls and who runs them, found before anything is sent."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import TilingError
from halovae.base.private_torch import pytree
from halovae.base.trees import is_picture, map_tensors, pictures_in
from halovae.calls.dataflow import Spec
from halovae.calls.randomness import Generators
from halovae.calls.record import NETWORKS, NetworkCall, Recorder, Recording, answering
from halovae.calls.state import unchanged
from halovae.calls.target import Target, tile_grid
from halovae.tiles.blend import Blends
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


# ---- whether the VAE's own tiles give a right picture ----------------------------------------------------------------


TOLERANCE = 0.05
"""Largest relative L2 distance that is put down to rounding: half precision gives 0.01, one misplaced tile of a
hundred 0.14."""


class Checker:
    """Records one half of a VAE with and without its tiles, and compares.

    Args:
        target: the VAE, set to use tiles.
    """

    def __init__(self, target: Target, half: str, blends: Blends) -> None:
        self._target, self._half, self._method = target, half, target.originals[half]
        self._recorder = Recorder(target.vae, half, self._method)
        self._blends = blends

    def recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        """The recording with the VAE as it is set."""
        with self._blends.skipped():
            return self._recorder.record(args, kwargs)

    def untiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording | None:
        """The recording without tiles in space; None for a VAE that runs in tiles only."""
        with applied(self._target.vae, {"use_tiling": False}):
            try:
                return self.recorded(args, kwargs)
            except NotImplementedError:
                if not self._target.needs_tiles(self._half, *args, **kwargs):
                    raise
                return None

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], tiled: Recording) -> None:
        """Compare what the VAE makes with and without tiles.

        Raises:
            TilingError: the tiled picture has another size, or its tiles are out of place.
        """
        whole = self.untiled(args, kwargs)
        if whole:
            got, want = _picture(tiled.result).shape, _picture(whole.result).shape
            if got != want:
                raise TilingError(f"gives {_times(got)} where {_times(want)} is right")
        # One tile may leave out the rest of the picture, where there is no other result to compare its size with.
        if (whole is None or len(tiled.calls) != len(whole.calls)) and self._distance(args, kwargs) > TOLERANCE:
            raise TilingError("puts tiles in the wrong place or leaves gaps between them")

    def _distance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """How far a small probe in tiles is from the same probe without, relative to how much it varies."""
        failure: Exception | None = None
        for frames in (1, None):
            small, small_kwargs = shrunk((args, kwargs), frames)
            try:
                tiled, whole = self.recorded(small, small_kwargs), self.untiled(small, small_kwargs)
            except Exception as error:
                failure = error
                continue
            if not tiled.calls:
                failure = TilingError("no tile is as small")
                continue
            if whole is None:  # only tiles: those of an even picture must make an even picture
                found = self._point_by_point(map_tensors(torch.ones_like, small), small_kwargs, tiled)
                first = 2 if self._half == "encode" else 1  # Nothing comes after a decoder that tells channels apart.
                even = found.mean(dim=tuple(range(first, found.ndim)), keepdim=True)
                return _relative(found - even, found)
            found = self._point_by_point(small, small_kwargs, tiled)
            with applied(self._target.vae, {"use_tiling": False}):
                expected = self._point_by_point(small, small_kwargs, whole)
            return _relative(found - expected, expected - expected.mean())
        raise TilingError(f"can't be tried on a small picture: {failure}") from failure

    def _point_by_point(self, args: tuple[Any, ...], kwargs: dict[str, Any], recording: Recording) -> Tensor:
        """What the VAE makes of a network that looks at one pixel at a time, alike in all channels and frames."""
        calls = iter(recording.calls)

        def network(picture: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = next(calls)
            plane = picture.float().flatten(1, -3).mean(1, keepdim=True)
            return call.result([_spread(plane, spec) for spec in call.specs], device=picture.device)

        vae = self._target.vae
        generators = Generators(pictures_in((args, kwargs))[0].device, *args, *kwargs.values())
        args, kwargs = map_tensors(torch.clone, (args, kwargs))  # The method may write into them.
        with torch.no_grad(), unchanged(vae), answering(vae, self._half, network), self._blends.fast():
            result = self._method(*args, **kwargs)
        generators.rewind()
        return _picture(result).double()


def _picture(result: Any) -> Tensor:
    pictures = pictures_in(result)
    if not pictures:
        raise TilingError(f"gives a {type(result).__name__} without a picture")
    return pictures[0]


def _spread(plane: Tensor, spec: Spec) -> Tensor:
    """A plane of values, resized and repeated in all channels and frames of a result."""
    plane = F.interpolate(plane, spec.shape[-2:], mode="nearest")
    plane = plane.view(len(plane), *[1] * (len(spec.shape) - 3), *spec.shape[-2:])
    return plane.expand(spec.shape).to(spec.dtype, copy=True)


def _relative(gap: Tensor, signal: Tensor) -> float:
    return float(torch.nan_to_num(gap, nan=float("inf")).norm() / signal.norm().clamp_min(1e-30))


def shrunk(values: Any, frames: int | None) -> Any:
    """The arguments with one picture of noise in the batch, the same in all frames, and only so many frames."""
    batch = pictures_in(values)[0].shape[0]
    generator = torch.Generator().manual_seed(0)

    def shrink(tensor: Tensor) -> Tensor:
        tensor = tensor[:1] if tensor.ndim and tensor.shape[0] == batch else tensor
        if not is_picture(tensor):
            return tensor
        noise = torch.randn((*tensor.shape[:2], *tensor.shape[-2:]), generator=generator, device="cpu")
        noise = 0.1 * noise.to(device=tensor.device, dtype=tensor.dtype)  # small: a clamp must make no difference
        return noise if tensor.ndim == 4 else noise.unsqueeze(2).expand(-1, -1, frames or tensor.shape[2], -1, -1)

    return map_tensors(shrink, values)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
