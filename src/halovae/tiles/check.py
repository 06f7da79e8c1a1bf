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

from halovae.base.errors import TilingError
from halovae.base.trees import is_picture, map_tensors, pictures_in
from halovae.calls.dataflow import Spec
from halovae.calls.randomness import Generators
from halovae.calls.record import Recorder, Recording, answering
from halovae.calls.state import unchanged
from halovae.calls.target import Target
from halovae.tiles.blend import Blends
from halovae.tiles.tile_settings import applied

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
        for frames in (1, 9, None):  # Some VAEs make nothing of one latent frame.
            small, small_kwargs = shrunk((args, kwargs), frames)
            try:
                tiled, whole = self.recorded(small, small_kwargs), self.untiled(small, small_kwargs)
            except Exception as error:
                failure = error
                continue
            if not tiled.calls:
                failure = TilingError("no tile is as small")
                continue
            if whole is None and frames not in (1, None):
                continue  # Tiles in time may leave out frames of a short clip, and there is nothing to compare with.
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
