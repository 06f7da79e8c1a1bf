"""Gates on the trained VAE and a real clip: what exact mode and tiles may change, in latents and in pixels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from clips import CLIP
from ranks import Ranks

import halovae
from halovae import media
from halovae.evaluation import compare_clips, compare_latents
from halovae.media import codec, models, vae_limits

FRAMES, HEIGHT, WIDTH = 5, 48, 64
Way = tuple[Any, Any]
"""Latents, and what they decode to."""


@functools.cache
def clip() -> Any:
    """Read once: all frames before are decoded, too."""
    return media.read(CLIP, frames=media.FrameRange(108, 108 + FRAMES), height=HEIGHT, width=WIDTH).frames


def through(vae: Any, dtype: torch.dtype) -> Way:
    limits = vae_limits.limits_of(vae)
    latents = codec.encode(vae, limits, codec.to_tensor(clip(), dtype, torch.device("cpu")))
    return latents.float().numpy(), codec.decode(vae, limits, latents).float().numpy()


def tiled(vae: Any, dtype: torch.dtype) -> Way:
    vae.enable_tiling(32, 32, 24, 24)
    try:
        return through(vae, dtype)
    finally:
        vae.disable_tiling()


def all_ways(rank: int) -> dict[str, Way]:
    """The same clip in every way that a gate compares."""
    ways: dict[str, Way] = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        vae = models.load(models.find(None), dtype=dtype, device=torch.device("cpu"))
        with torch.inference_mode():
            if rank == 0:
                ways[name] = through(vae, dtype)
            with halovae.parallelize(vae, verify=False):
                ways[f"{name} exact"] = through(vae, dtype)
            if name == "float32":
                if rank == 0:
                    ways["tiles"] = tiled(vae, dtype)
                with halovae.parallelize(vae, mode="tile"):
                    ways["tile"] = tiled(vae, dtype)
    return ways


@pytest.fixture(scope="module")
def ways(two_ranks: Ranks) -> dict[str, Way]:
    return two_ranks.run(all_ways)[0]


def pixels(way: Way) -> Any:
    return (way[1].clip(-1, 1) + 1).transpose(1, 2, 3, 0) * np.float32(127.5)


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_exact_is_the_unparallel_result(ways: dict[str, Way]) -> None:
    """Float32 has 24 bits: a hundred times their rounding, where a missing row moves latents by 1e-2."""
    latents = compare_latents(torch.from_numpy(ways["float32"][0]), torch.from_numpy(ways["float32 exact"][0]))
    assert latents.relative_l2 < 1e-5
    found = compare_clips(pixels(ways["float32"]), pixels(ways["float32 exact"]))
    assert found.largest < 0.05
    assert found.psnr > 90


def test_tiles_are_those_of_diffusers(ways: dict[str, Way]) -> None:
    for found, expected in zip(ways["tile"], ways["tiles"], strict=True):
        assert np.array_equal(found, expected)


def test_tiles_move_the_result_and_exact_does_not(ways: dict[str, Way]) -> None:
    """So the gates above can fail: the same numbers tell tiles from the un-tiled result."""
    assert distance(ways["tile"][0], ways["float32"][0]) > 1e-3
    assert compare_clips(pixels(ways["float32"]), pixels(ways["tile"])).psnr < 60


@pytest.mark.parametrize("part", [0, 1], ids=["latents", "pixels"])
def test_bfloat16_is_no_worse_on_shards(part: int, ways: dict[str, Way]) -> None:
    """Rounding differs, for sums are made in another order; its size must not."""
    expected = ways["float32"][part]
    alone, exact = (distance(ways[name][part], expected) for name in ("bfloat16", "bfloat16 exact"))
    assert 0 < exact <= 1.1 * alone
