"""`parallelize(mode="tile")`: the VAE's own tiled result, through the same handle as exact mode."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import EXACT, FAMILIES, run_decode, run_encode
from pictures import error, kl, latents, raises
from ranks import Ranks
from tiles import CUTS, strides

import halovae
from halovae.base.errors import InputError, NotExactError, TilingError


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


# ---- the reference: the un-tiled result, but where a VAE comes tiled -------------------------------------------------


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What halovae warns of within it."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("halovae").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("halovae").removeHandler(handler)


def comes_tiled(rank: int) -> None:
    """Its tiles by default, for as long as they are on; exact mode by name, and not in silence."""
    cut = CUTS["minimax_h3"]
    vae = cut.build().double()
    z, x = cut.picture("decode").double(), cut.picture("encode")[:, :, :1].double()
    decoded, moments = vae.decode(z).sample, run_encode(vae, x)
    vae.disable_tiling()
    untiled = run_encode(vae, x)
    vae.enable_tiling()
    assert error(moments, untiled) > 1e-3

    def reports(handle: halovae.Handle, mode: str, reference: str) -> None:
        assert handle.last is not None
        assert (handle.last.mode, handle.last.reference) == (mode, reference)
        assert f"reference: {reference}" in str(handle.last)

    with warnings() as said:
        handle = halovae.parallelize(vae)
        assert torch.equal(vae.decode(z).sample, decoded)
        reports(handle, "tile", "tiles")
        assert "tile, reference: tiles" in repr(handle)
        assert torch.equal(run_encode(vae, x), moments)
        vae.disable_tiling()
        assert error(run_encode(vae, x), untiled) <= 1e-6
        reports(handle, "exact", "un-tiled")
        vae.enable_tiling()
        assert torch.equal(run_encode(vae, x), moments)

        handle = halovae.parallelize(vae, mode="auto")
        assert torch.equal(run_encode(vae, x), moments)
        assert handle.last is not None
        assert "comes tiled" in handle.last.choice
        vae.use_tiling = rank == 0
        with raises(halovae.DisagreementError, "disagree on mode: rank 0 has tile, rank 1 has exact"):
            halovae.parallelize(vae)
        vae.use_tiling = True
        with raises(InputError, "tiles overlap.*or mode='exact'"):
            halovae.parallelize(vae, gather="shard")
        assert said == []

        with raises(InputError, "comes tiled, its tiles are its own result .* or give untiled=True"):
            halovae.parallelize(vae, mode="exact")
        with raises(InputError, "untiled=True is for exact mode, but mode is 'tile'"):
            halovae.parallelize(vae, mode="tile", untiled=True)
        assert torch.equal(run_encode(vae, x), moments)
        handle = halovae.parallelize(vae, untiled=True)
        assert error(run_encode(vae, x), untiled) <= 1e-6
        reports(handle, "exact", "un-tiled")
        with raises(NotExactError, "Use mode='tile' for this VAE"):
            vae.decode(z)
        assert said == []
    halovae.restore(vae)


def test_a_vae_that_comes_tiled_runs_in_its_tiles(two_ranks: Ranks) -> None:
    two_ranks.run(comes_tiled)


def switched_on(rank: int) -> None:
    """One warning where the user has asked for tiles: at once, or at the first call that does without."""
    vae, z = kl(), latents(12, 12)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    untiled = vae.decode(z)[0]
    once = [True] * (rank == 0)
    for early in (True, False):
        vae.use_tiling = early
        with warnings() as said, halovae.parallelize(vae, verify=False) as handle:
            assert len(said) == (early and rank == 0)
            vae.enable_tiling()
            for _ in range(2):
                assert error(vae.decode(z)[0], untiled) <= EXACT
            assert ["has tiling switched on" in words for words in said] == once
            assert handle.last is not None
            assert handle.last.reference == "un-tiled"


def test_tiling_that_the_user_has_switched_on_is_not_overridden_in_silence(two_ranks: Ranks) -> None:
    two_ranks.run(switched_on)


def test_one_process_gives_the_vaes_own_result_too() -> None:
    cut = CUTS["minimax_h3"]
    vae, z = cut.build(), cut.picture("decode")
    expected = vae.decode(z).sample
    for start in (halovae.optimize, halovae.parallelize):
        with start(vae) as handle:
            assert torch.equal(vae.decode(z).sample, expected)
            assert handle.last is not None
            assert handle.last.tiles == cut.chains("decode")
    tiled = kl()
    tiled.enable_tiling()
    with warnings() as said, halovae.optimize(tiled):
        assert len(said) == 1


def test_whether_a_vae_comes_tiled_is_seen_without_a_config_too() -> None:
    class Tiled(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.use_tiling, self.size = True, size
            self.decoder = torch.nn.Identity()

        def decode(self, z: torch.Tensor) -> Any:
            return self.decoder(z)

    class Switchable(Tiled):
        def enable_tiling(self) -> None:
            self.use_tiling = True

    for cls, mode in ((Tiled, "tile"), (Switchable, "exact")):
        with halovae.parallelize(cls(4)) as handle:
            assert f"{mode}, " in repr(handle)


def test_a_vae_that_knows_no_shapes_without_values_is_refused_by_name() -> None:
    family = FAMILIES["ltx2_diffusion"]
    vae = family.build()
    with (
        halovae.parallelize(vae, mode="tile"),
        raises(TilingError, "Model can't be planned on shapes"),
    ):
        vae.decode(family.latent())
