"""Broken tiled methods of diffusers are found out before they run, and what helps is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from tiles import factors, strides

from halovae.base.errors import TilingError
from halovae.calls.target import Target
from halovae.tiles.blend import Blends
from halovae.tiles.tile_plan import Planner

KL_200 = {"tile_sample_min_size": 200, "tile_latent_min_size": 25}
COG = factors(64, 8) | {"tile_overlap_factor_height": 1 / 6, "tile_overlap_factor_width": 1 / 5}
STALE = {"tile_sample_min_height": 128, "tile_sample_min_width": 128}
LTX2 = strides(128, 96, spatial_compression_ratio=32, temporal_compression_ratio=8)

BROKEN = [
    ("magvit", "encode", strides(64, 48), 96, "wrong place.*: use mode='exact'"),
    ("hunyuan_image", "encode", {"tile_sample_min_size": 64, "tile_latent_min_size": 8}, 96, "fails.*use mode='exact'"),
    ("hunyuan_image_refiner", "decode", strides(64, 48), 96, "6 x 6 where .* 96 x 96 is right: use mode='exact'"),
    ("hunyuan_video15", "decode", STALE, 320, "192 x 192 where .* set vae.tile_latent_min_height = 8"),
    ("cogvideox", "decode", COG, 96, "gives .* set vae.tile_overlap_factor_height"),
    ("kl", "decode", KL_200, 320, "332 x 332 where .* set vae.tile_overlap_factor = 0.24"),
    ("kl", "encode", KL_200, 320, "set vae.tile_overlap_factor = 0.24"),
    ("wan21", "encode", strides(64, 50), 96, "11 x 11 where .* set vae.tile_sample_stride_height = 48"),
    ("wan21", "decode", strides(64, 50), 96, "wrong place.* set vae.tile_sample_stride_height = 48"),
    ("ltx2", "decode", LTX2, 224, "fails .*Padding size"),
    ("asymmetric", "decode", {}, 96, "has no tiles: use mode='exact'"),
    ("consistency", "decode", {}, 96, "has no tiles: use mode='exact'"),
]


@pytest.mark.parametrize(("name", "half", "settings", "size", "message"), BROKEN)
def test_broken_tiles(name: str, half: str, settings: dict[str, Any], size: int, message: str) -> None:
    family = FAMILIES[name]
    vae = family.build()
    vae.__dict__.update(settings)
    shape = list(family.sample_shape if half == "encode" else family.latent_shape)
    side = size if half == "encode" else size // family.ratio[0]
    shape[0], shape[-2:] = 1, [side, side]
    picture = torch.randn(shape)
    with pytest.raises(TilingError, match=message) as caught:
        Planner(Target(vae), half, Blends(vae), ranks=2).plan((picture,), {})
    assert "\n" not in str(caught.value)
