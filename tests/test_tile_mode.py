"""`parallelize(mode="tile")`: the VAE's own tiled result, through the same handle as exact mode."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, run_decode, run_encode
from ranks import Ranks
from tiles import strides

import halovae


def tiled_calls(rank: int) -> list[tuple[bool, int, str]]:
    """For each half: whether the result is diffusers' own, how many tiles there were, and the report's words."""
    family = FAMILIES["wan21"]
    vae = family.build()
    vars(vae).update(strides(32, 24))
    vae.use_tiling = True
    sample, latent = torch.randn(1, 3, 5, 56, 56), torch.randn(1, 4, 2, 7, 7)
    for tensor in (sample, latent):
        tensor.copy_(torch.linspace(-1, 1, tensor.numel()).view_as(tensor))
    expected = run_encode(vae, sample), run_decode(family, vae, latent)
    outcomes: list[tuple[bool, int, str]] = []
    with halovae.parallelize(vae, mode="tile") as handle:
        for want, call in zip(
            expected, (lambda: run_encode(vae, sample), lambda: run_decode(family, vae, latent)), strict=True
        ):
            equal = torch.equal(call(), want)
            assert handle.last is not None
            outcomes.append((equal, handle.last.tiles, str(handle.last)))
    return outcomes


def test_tile_mode_gives_the_vaes_own_tiled_result(two_ranks: Ranks) -> None:
    for outcomes in two_ranks.run(tiled_calls):
        for equal, tiles, words in outcomes:
            assert equal
            assert tiles == 9
            assert "tile on 9 tiles" in words


def test_a_shard_of_tiles_is_refused() -> None:
    with pytest.raises(halovae.InputError, match="tiles overlap"):
        halovae.parallelize(FAMILIES["wan21"].build(), mode="tile", gather="shard")


def gathered(rank: int, mode: str) -> tuple[bool, tuple[int, ...]]:
    """Whether the latents are whole, and the shape of what decode gives."""
    family = FAMILIES["wan21"]
    vae = family.build()
    vars(vae).update(strides(32, 24))
    with halovae.parallelize(vae, mode=mode, gather={"decode": "first"}, verify=False):
        moments = run_encode(vae, family.sample())
        return tuple(moments.shape[-2:]) == (5, 7), tuple(run_decode(family, vae, family.latent()).shape[-2:])


@pytest.mark.parametrize(("mode", "others"), [("tile", (0, 0)), ("exact", (40, 32))])
def test_each_half_has_its_own_holders(two_ranks: Ranks, mode: str, others: tuple[int, int]) -> None:
    assert two_ranks.run(gathered, mode) == [(True, (40, 56)), (True, others)]


@pytest.mark.parametrize("gather", [{"encode": "some"}, {"encoder": "all"}, ["all", "first"], 3])
def test_holders_that_are_none(gather: object) -> None:
    with pytest.raises(halovae.InputError, match="gather"):
        halovae.parallelize(FAMILIES["wan21"].build(), gather=gather)  # type: ignore[arg-type]
