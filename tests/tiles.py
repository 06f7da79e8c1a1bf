"""Tiny autoencoders cut into tiles, as one table, and the two ways to run them: halovae's and diffusers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from families import FAMILIES, Family

from halovae import comm
from halovae.calls.target import Target
from halovae.tiles.tile_runner import TileOutcome, TileRunner


@dataclass(frozen=True)
class Cut:
    """An autoencoder of `families`, its tile settings, and a picture that takes four tiles."""

    name: str
    settings: Mapping[str, Any]
    size: int
    """Height and width of the picture, in pixels."""
    frames: int = 0
    """Of a video, where fewer do than those of the family."""
    tiles: int | tuple[int, int] = 4
    """Chains of calls, of encode and decode where they differ."""
    encode: bool = True
    decode: bool = True

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def build(self) -> Any:
        vae = self.family.build()
        assert self.settings.keys() <= vars(vae).keys(), "a setting that the VAE does not have"
        for name, value in self.settings.items():
            setattr(vae, name, value)
        return vae

    def chains(self, half: str) -> int:
        return self.tiles if isinstance(self.tiles, int) else self.tiles[half == "decode"]

    def picture(self, half: str, height: int = 0, width: int = 0) -> torch.Tensor:
        """Noise as input of a half, by default of `size`."""
        shape = list(self.family.sample_shape if half == "encode" else self.family.latent_shape)
        ratio = 1 if half == "encode" else self.family.ratio[0]
        shape[0] = 1
        if self.frames:
            shape[2] = self.frames if half == "encode" else (self.frames - 1) // self.family.ratio[1] + 1
        shape[-2:] = (height or self.size) // ratio, (width or self.size) // ratio
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def strides(size: int, stride: int, **more: Any) -> dict[str, Any]:
    axes = "height", "width"
    return (
        {f"tile_sample_min_{axis}": size for axis in axes}
        | {f"tile_sample_stride_{axis}": stride for axis in axes}
        | more
    )


def factors(size: int, latent: int, factor: str = "tile_overlap_factor_{}") -> dict[str, Any]:
    axes = "height", "width"
    return (
        {f"tile_sample_min_{axis}": size for axis in axes}
        | {f"tile_latent_min_{axis}": latent for axis in axes}
        | {factor.format(axis): 0.25 for axis in axes}
    )


_SQUARE = {"tile_sample_min_size": 64, "tile_latent_min_size": 8, "tile_overlap_factor": 0.25}
_DC = strides(128, 96, tile_latent_min_height=4, tile_latent_min_width=4)
_H3 = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 64,
    "tile_sample_min_overlap_height": 16,
    "tile_sample_min_overlap_width": 16,
}

CUTS = {
    cut.name: cut
    for cut in (
        Cut("kl", _SQUARE, 96),
        Cut("flux2", _SQUARE, 96),
        Cut("kvae", _SQUARE, 96),
        Cut("tiny", _SQUARE, 96),
        Cut("hunyuan_image", _SQUARE, 96, encode=False),
        Cut("consistency", _SQUARE, 96, decode=False),
        Cut("dc", _DC, 192),
        Cut("wan21", strides(64, 48), 96, frames=5),
        Cut("wan22", strides(64, 32), 128, frames=5, tiles=(4, 16)),
        Cut("qwenimage", strides(64, 48), 96),
        Cut("qwenimage21", strides(64, 48), 96),
        Cut("hunyuan_video_framewise", strides(64, 48), 96, tiles=8),
        Cut("hunyuan_video15", factors(64, 4, "tile_overlap_factor"), 96, frames=5),
        Cut("ltx", strides(128, 96), 192),
        Cut("ltx091", strides(128, 96), 192),
        Cut("ltx2", strides(128, 64, spatial_compression_ratio=32, temporal_compression_ratio=8), 192, tiles=9),
        Cut("cogvideox", factors(64, 8), 96, frames=13),
        Cut("mochi", strides(64, 48), 96),
        Cut("magvit", strides(64, 48), 96, frames=5, encode=False),
        Cut("vidtok", factors(64, 8), 96, frames=8),
        Cut("allegro_tiled", {}, 40),
        Cut("minimax_h3", _H3, 96, tiles=(8, 4)),
    )
    if cut.name in FAMILIES
}
"""Every class of diffusers whose tiled path works, at sizes that a test can afford."""


def run(
    cut: Cut, vae: Any, half: str, picture: torch.Tensor, group: Any = None, **options: Any
) -> tuple[torch.Tensor, TileOutcome]:
    """The half in tiles on the ranks of a group: the tensor, and the outcome."""
    ranks = comm.connect(group)
    runner = TileRunner(ranks, Target(vae), **({"ranks": ranks.size} | options))
    kwargs = cut.family.decode_kwargs(picture) if half == "decode" else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outcome = runner.run(half, (picture,), kwargs)
    return tensor_of(outcome.result), outcome


def run_alone(cut: Cut, vae: Any, half: str, picture: torch.Tensor) -> torch.Tensor:
    """The half as diffusers itself tiles it."""
    vae.use_tiling = True
    kwargs = cut.family.decode_kwargs(picture) if half == "decode" else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensor_of(getattr(vae, half)(picture, **kwargs))


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor in what encode or decode returns: a distribution's moments, latents, or a picture."""
    if torch.is_tensor(output):
        return output
    value = output[0]
    return value if torch.is_tensor(value) else value.parameters
