"""Whether the VAE's own tiles give a right picture, found out without running its network.

Some tiled methods of diffusers give a picture of the wrong size, or put tiles in the wrong place. Sizes come from a
recording. Places are tried out: with a network that treats every pixel by itself, tiles change nothing, so whatever
they do change is out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.errors import TilingError
from halovae.randomness import Generators
from halovae.record import NetworkCall, Recording, answering, record
from halovae.target import Target
from halovae.tile.settings import applied
from halovae.trees import is_picture, map_tensors, pictures_in

TOLERANCE = 0.05
"""Largest relative L2 distance that is put down to rounding: half precision gives 0.01, one misplaced tile of a
hundred 0.14."""


def check_tiles(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], tiled: Recording) -> None:
    """Compare what the VAE makes with and without tiles.

    Args:
        target: the VAE, set to use tiles.
        half: "encode" or "decode".
        args: the call's arguments.
        kwargs: likewise.
        tiled: the recording of the call.

    Raises:
        TilingError: the tiled picture has another size, or its tiles are out of place.
    """
    whole = _untiled(target, half, args, kwargs)
    if whole:
        got, want = pictures_in(tiled.result)[0].shape, pictures_in(whole.result)[0].shape
        if got != want:
            raise TilingError(f"gives {_times(got)} where {_times(want)} is right")
    if len(tiled.calls) != (len(whole.calls) if whole else 1) and _distance(target, half, args, kwargs) > TOLERANCE:
        raise TilingError("puts tiles in the wrong place or leaves gaps between them")


def _distance(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """How far a small probe in tiles is from the same probe without, relative to how much it varies."""
    failure: Exception | None = None
    for frames in (1, None):
        small, small_kwargs = _shrunk((args, kwargs), frames)
        try:
            tiled = record(target.vae, half, target.originals[half], small, small_kwargs)
            whole = _untiled(target, half, small, small_kwargs)
        except Exception as error:
            failure = error
            continue
        if whole is None:  # only tiles: those of an even picture must make an even picture
            small = map_tensors(torch.ones_like, small)
            found = _point_by_point(target, half, small, small_kwargs, tiled)
            expected = found.mean(dim=(-2, -1), keepdim=True).expand_as(found)
            return _relative(found - expected, found)
        found = _point_by_point(target, half, small, small_kwargs, tiled)
        with applied(target.vae, {"use_tiling": False}):
            expected = _point_by_point(target, half, small, small_kwargs, whole)
        return _relative(found - expected, expected - expected.mean())
    raise TilingError(f"can't be tried on a small picture: {failure}") from failure


def _relative(gap: Tensor, signal: Tensor) -> float:
    return float(torch.nan_to_num(gap, nan=float("inf")).norm() / signal.norm().clamp_min(1e-30))


def _untiled(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording | None:
    """The recording without tiles in space; None for a VAE that runs in tiles only."""
    with applied(target.vae, {"use_tiling": False}):
        try:
            return record(target.vae, half, target.originals[half], args, kwargs)
        except NotImplementedError:
            return None


def _shrunk(values: Any, frames: int | None) -> Any:
    """The arguments with one picture of noise in the batch, the same in all frames, and only so many frames."""
    batch = pictures_in(values)[0].shape[0]
    generator = torch.Generator().manual_seed(0)

    def shrink(tensor: Tensor) -> Tensor:
        tensor = tensor[:1] if tensor.ndim and tensor.shape[0] == batch else tensor
        if not is_picture(tensor):
            return tensor
        noise = torch.randn((*tensor.shape[:2], *tensor.shape[-2:]), generator=generator)
        noise = 0.1 * noise.to(device=tensor.device, dtype=tensor.dtype)  # small: a clamp must make no difference
        return noise if tensor.ndim == 4 else noise.unsqueeze(2).expand(-1, -1, frames or tensor.shape[2], -1, -1)

    return map_tensors(shrink, values)


def _point_by_point(
    target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], recording: Recording
) -> Tensor:
    """What the VAE makes of a network that looks at one pixel at a time and is the same in all channels and frames."""
    calls = iter(recording.calls)

    def network(picture: Tensor, *args: Any, **kwargs: Any) -> Any:
        call: NetworkCall = next(calls)
        used: list[Tensor] = []
        for spec in call.specs:
            plane = picture.float().flatten(1, -3).mean(1, keepdim=True)
            plane = F.interpolate(plane, spec.shape[-2:], mode="nearest")
            plane = plane.view(len(plane), *[1] * (len(spec.shape) - 3), *spec.shape[-2:])
            used.append(plane.expand(spec.shape).to(spec.dtype, copy=True))
        return call.result(used, device=picture.device)

    generators = Generators(pictures_in((args, kwargs))[0].device, *args, *kwargs.values())
    with torch.no_grad(), answering(target.vae, half, network):
        result = target.originals[half](*args, **kwargs)
    generators.rewind()
    return pictures_in(result)[0].double()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
