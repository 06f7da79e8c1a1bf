"""Whole pipelines on two ranks give what one rank gives, with the VAE and the transformer spread."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from numpy.typing import NDArray
from ranks import Ranks
from torch import Tensor, nn

from halovae import media
from halovae.pipelines.stages import DENOISE, TEXT_ENCODE, VAE_DECODE, VAE_ENCODE

LATENTS = 1e-4
"""In float32: sums in another order differ by 1e-7, and three steps of random networks amplify it."""
SSIM = 0.999


def ssim(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Structural similarity of Wang et al. (2004): 8 x 8 windows, mean over windows, channels and frames."""
    a, b = (torch.from_numpy(x).double().permute(0, 3, 1, 2) for x in (one, other))

    def mean(values: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(values, 8, stride=1)

    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    covariance = mean(a * b) - mean(a) * mean(b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    return float((above / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (variances + c2))).mean())


def through_file(frames: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    media.write(path, frames, Fraction(16))
    return media.read(path).frames


@pytest.mark.parametrize("name", pipelines.BUILDERS)
def test_two_ranks_give_what_one_gives(name: str, two_ranks: Ranks, tmp_path: Path) -> None:
    (expected,), alone = pipelines.run(0, name, {}, True)
    setup = {} if name in pipelines.NOT_SPREAD else {"ulysses_degree": 2}
    first, second = two_ranks.run(pipelines.run, name, setup)
    for (latents,), _ in (first, second):
        assert latents.shape == expected.shape
        assert (latents - expected).abs().max() <= LATENTS * expected.abs().max()
    assert second[1].frames is None
    halves = ["decode"] if name == "text" else ["encode", "decode"]
    for _, result in (first, second):
        assert [half for half, _ in result.calls] == halves
        assert all(report.shape in ((1, 2), (2, 1)) for _, report in result.calls)
        stages = {TEXT_ENCODE, DENOISE, VAE_DECODE} | ({VAE_ENCODE} if "encode" in halves else set())
        assert all(result.seconds[stage] > 0 for stage in stages)
    assert alone.frames is not None
    assert first[1].frames is not None
    assert alone.frames.std() > 5
    assert np.abs(alone.frames.astype(int) - first[1].frames).max() <= 1
    if name in pipelines.GRAINY:
        return
    files = [through_file(frames, tmp_path / f"{i}.mp4") for i, frames in enumerate((alone.frames, first[1].frames))]
    assert ssim(*files) >= SSIM


@pytest.mark.parametrize(("setup", "halves"), [({"vae_encode": False}, ["decode"]), ({"vae_decode": False}, ["encode"]),
                                               ({"vae_size": 1}, [])])  # fmt: skip
def test_halves_that_are_not_parallel(setup: dict[str, Any], halves: list[str], two_ranks: Ranks) -> None:
    """They run on each rank alone, with the same result; without decode on all ranks, each has the picture."""
    (expected,), alone = pipelines.run(0, "edit", {}, True)
    for rank, ((latents,), result) in enumerate(two_ranks.run(pipelines.run, "edit", setup)):
        assert [half for half, _ in result.calls] == halves
        assert (latents - expected).abs().max() <= LATENTS * expected.abs().max()
        if rank == 0:
            assert np.abs(result.frames.astype(int) - alone.frames).max() <= 1


def test_layers_that_wait_on_the_host_change_nothing(two_ranks: Ranks) -> None:
    """On the CPU the hooks of offloading run too, around shards."""
    (expected,), _ = pipelines.run(0, "one frame", {}, True)
    for (latents,), _ in two_ranks.run(pipelines.run, "one frame", {"layerwise_offload": True, "ulysses_degree": 2}):
        assert (latents - expected).abs().max() <= LATENTS * expected.abs().max()
