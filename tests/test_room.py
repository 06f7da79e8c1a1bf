"""A call that can't fit is refused before it begins, the first one too, on all ranks and with what would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pictures import kl, raises
from ranks import Ranks
from tiles import CUTS, run_alone
from torch import Tensor, nn

import halovae
from halovae.base.errors import RankFailedError, TooLittleMemoryError
from halovae.calls.target import Target
from halovae.comm.bandwidth import LinkSpeed
from halovae.exact.mesh import plan_shards
from halovae.predict import memory_check
from halovae.predict.memory_check import Room
from halovae.predict.predictor import Predictor
from halovae.predict.rates import GivenSpeed

LATENT = torch.zeros(1, 4, 24, 24, dtype=torch.float64)
PLAN = plan_shards(24, 24, 1, 2)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free."""
    return lambda count: monkeypatch.setattr(memory_check, "free_bytes", lambda device: count)


def check(checked: Room, latent: Tensor = LATENT) -> None:
    checked.check("decode", PLAN, 1, "all", latent, (latent,), {})


def predictor(vae: Any) -> Predictor:
    return Predictor(Target(vae), GivenSpeed(flops=1e12, bandwidth=1e11), LinkSpeed(latency=1e-5, bandwidth=1e9))


def needed(vae: Any, ranks: int) -> int:
    """Bytes besides the latents that a decode takes, as `halovae plan` says."""
    return predictor(vae).exact("decode", (LATENT,), {}, ranks=ranks).memory - LATENT.nbytes


def test_the_first_call_is_checked(free: Callable[[int], None]) -> None:
    vae = kl()
    checked = Room(Target(vae))
    on_two, on_four = needed(vae, 2), needed(vae, 4)
    free(on_two)
    check(checked)
    free(on_two - 1)
    with pytest.raises(
        TooLittleMemoryError, match=r"decode needs about .* MiB on each of 2 ranks, .*: use 4 ranks or "
    ):
        check(checked)
    free(on_four - 1)
    with pytest.raises(TooLittleMemoryError, match=r": use 8 ranks or "):
        check(checked)


def test_tiles_are_named_where_they_fit(free: Callable[[int], None]) -> None:
    vae = kl()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    in_tiles = predictor(vae).tile("decode", (LATENT,), {}, ranks=2).memory - LATENT.nbytes
    checked = Room(Target(vae))
    free(in_tiles)
    with pytest.raises(TooLittleMemoryError, match=r"mode='tile' or a smaller picture$"):
        check(checked)
    free(in_tiles // 8)
    with pytest.raises(TooLittleMemoryError, match=r": use a smaller picture$"):
        check(checked)


def test_a_shape_is_predicted_once_and_a_small_one_never(free: Callable[[int], None]) -> None:
    vae, calls = kl(), 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    vae.decoder.register_forward_pre_hook(count)
    checked = Room(Target(vae))
    free(2**30)
    check(checked, LATENT[..., :2, :2])
    assert calls == 0
    free(needed(vae, 2))
    calls = 0
    check(checked)
    check(checked)
    assert calls == 1


class Peeking(nn.Module):
    """Its decode looks at values: it can't be followed on shapes alone."""

    def decode(self, z: Tensor) -> Tensor:
        return z * float(z.abs().max())


def test_what_cannot_be_followed_is_learned(free: Callable[[int], None]) -> None:
    checked = Room(Target(Peeking()))
    free(2**20)
    checked.learn("decode", PLAN, LATENT, 2**21)  # Too little to tell.
    check(checked)
    checked.learn("decode", PLAN, LATENT, 2**30)
    free(2**29)
    with pytest.raises(
        TooLittleMemoryError,
        match=r"about 1.0 GiB on each of 2 ranks, but 512.0 MiB .*: use 4 ranks or a smaller picture$",
    ):
        check(checked)


def little_memory(rank: int) -> None:
    """One rank has less than the others: all are told."""
    vae = kl()
    before = memory_check.free_bytes
    with halovae.parallelize(vae, verify=False):
        memory_check.free_bytes = lambda device: 2**20 if rank == 1 else 2**60
        try:
            with raises((RankFailedError, TooLittleMemoryError)[rank], "decode needs about .* MiB on each of 2 ranks"):
                vae.decode(LATENT)
        finally:
            memory_check.free_bytes = before
        vae.decode(LATENT[..., :8, :8])


def test_too_little_memory_on_one_rank_is_said_on_all(two_ranks: Ranks) -> None:
    two_ranks.run(little_memory)


# ---- tile mode -------------------------------------------------------------------------------------------------------

CUT = CUTS["kl"]
TILED = CUT.picture("decode")


def needed_in_tiles(vae: Any, ranks: int) -> int:
    return predictor(vae).tile("decode", (TILED,), {}, ranks=ranks).memory - TILED.nbytes


def check_tiles(checked: Room, settings: dict[str, Any], ratio: Callable[[], int] = lambda: 1) -> None:
    checked.check_tiles("decode", settings, 2, ratio, "all", TILED, (TILED,), {})


def test_tiles_are_checked_too(free: Callable[[int], None]) -> None:
    vae = CUT.build()
    checked, on_two = Room(Target(vae)), needed_in_tiles(vae, 2)
    free(on_two)
    check_tiles(checked, {})
    free(on_two - 1)
    with pytest.raises(TooLittleMemoryError, match=r"^decode in tiles needs about .* MiB on each of 2 ranks, .*: use "):
        check_tiles(checked, {})


def test_exact_mode_is_named_where_it_fits(free: Callable[[int], None]) -> None:
    vae = CUT.build()
    checked = Room(Target(vae))
    on_sixteen = predictor(vae).exact("decode", (TILED,), {}, ranks=16).memory - TILED.nbytes
    assert on_sixteen < needed_in_tiles(vae, 16)
    free(on_sixteen)
    with pytest.raises(
        TooLittleMemoryError, match=r": use mode='exact' on \d+ ranks or smaller tiles or a smaller pic"
    ):
        check_tiles(checked, {})

    def unknown() -> int:
        raise MemoryError

    with pytest.raises(TooLittleMemoryError, match=r": use smaller tiles or a smaller picture$"):
        check_tiles(checked, {}, unknown)
    free(1)
    with pytest.raises(TooLittleMemoryError, match=r": use smaller tiles or a smaller picture$"):
        check_tiles(checked, {})


def test_settings_that_a_call_brings_count(free: Callable[[int], None]) -> None:
    """The same room for larger tiles and for the VAE's own: known apart, though the shapes are the same."""
    vae = CUT.build()
    checked = Room(Target(vae))
    free(needed_in_tiles(vae, 2))
    check_tiles(checked, {})
    with pytest.raises(TooLittleMemoryError):
        check_tiles(checked, {"tile_sample_min_size": 96, "tile_latent_min_size": 12})


def little_memory_for_tiles(rank: int) -> None:
    vae, before = CUT.build(), memory_check.free_bytes
    expected = run_alone(CUT, vae, "decode", TILED)
    with halovae.parallelize(vae, mode="tile"):
        memory_check.free_bytes = lambda device: 2**10 if rank == 1 else 2**60
        try:
            with raises((RankFailedError, TooLittleMemoryError)[rank], "decode in tiles needs about"):
                vae.decode(TILED)
        finally:
            memory_check.free_bytes = before
        assert torch.equal(vae.decode(TILED)[0], expected)


def test_too_little_memory_for_tiles_is_said_on_all(two_ranks: Ranks) -> None:
    two_ranks.run(little_memory_for_tiles)
