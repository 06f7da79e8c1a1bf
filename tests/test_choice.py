"""`mode="auto"`: the faster mode by prediction, the same on every rank, and it says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, run_decode
from ranks import Ranks
from speeds import BANDWIDTH, given_speeds
from tiles import CUTS, run_alone

import halovae
from halovae.comm.bandwidth import LinkSpeed
from halovae.predict.measured_rates import MeasuredSpeed


def with_link(rank: int, name: str, latency: float, gather: str = "all") -> tuple[str, str, bool, list[str]]:
    """Mode, reason, whether the result is that of the mode, and what the log says, on a link of this latency."""
    family, cut = FAMILIES[name], CUTS.get(name)
    vae = (cut or family).build()
    latent = cut.picture("decode") if cut else family.latent()
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("halovae")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with given_speeds(latency), halovae.parallelize(vae, mode="auto", gather=gather, verify=False) as handle:
            found = run_decode(family, vae, latent)
            again = run_decode(family, vae, latent)
            assert torch.equal(found, again)
            report: Any = handle.last
    finally:
        logger.removeHandler(handler)
    if report.mode == "tile":
        assert cut
        same = torch.equal(found, run_alone(cut, vae, "decode", latent))
    else:
        same = found.shape[-1] < 96 or torch.allclose(found, run_decode(family, vae, latent), atol=1e-4)
    return report.mode, report.choice, same, logged


@pytest.mark.parametrize(("latency", "mode"), [(1e-6, "exact"), (1.0, "tile")])
def test_the_link_decides(two_ranks: Ranks, latency: float, mode: str) -> None:
    results = two_ranks.run(with_link, "wan21", latency)
    for found, choice, same, logged in results:
        assert found == mode
        assert same
        assert choice.startswith(f"{mode}: predicted exact ")
        assert f"link {LinkSpeed(latency=latency, bandwidth=BANDWIDTH)}" in choice
        assert logged == [f"decode of AutoencoderKLWan: {choice}"]
        assert choice == results[0][1]


def test_a_vae_without_tiles_is_run_exactly(two_ranks: Ranks) -> None:
    for mode, choice, _, _ in two_ranks.run(with_link, "asymmetric", 1.0):
        assert mode == "exact"
        assert "the other way is refused" in choice


def test_a_vae_that_exact_mode_refuses_is_run_in_tiles(two_ranks: Ranks) -> None:
    for mode, choice, same, _ in two_ranks.run(with_link, "allegro_tiled", 1e-6):
        assert (mode, same) == ("tile", True)
        assert "the other way is refused" in choice


def test_shards_are_exact(two_ranks: Ranks) -> None:
    for mode, choice, _, _ in two_ranks.run(with_link, "wan21", 1.0, "shard"):
        assert mode == "exact"
        assert "can't stay in shards" in choice


def test_one_rank() -> None:
    family = FAMILIES["wan21"]
    with halovae.parallelize(vae := family.build(), mode="auto") as handle:
        run_decode(family, vae, family.latent())
        assert handle.last is not None
        assert handle.last.choice == "exact: one rank sends nothing"


def with_trials(rank: int, device: Callable[..., Any]) -> tuple[str, bool]:
    """The reason, and whether the generator is where it was, when the device has yet to be tried."""
    family = FAMILIES["wan21"]
    vae = family.build()
    with given_speeds(1e-6, device), halovae.parallelize(vae, mode="auto", verify=False) as handle:
        before = torch.get_rng_state()
        run_decode(family, vae, family.latent())
        report: Any = handle.last
    return report.choice, torch.equal(before, torch.get_rng_state())


def without_memory(*kind: Any) -> MeasuredSpeed:
    raise torch.OutOfMemoryError("trials want more than there is")


def test_trials_leave_generators_as_they_were(two_ranks: Ranks) -> None:
    for choice, same in two_ranks.run(with_trials, MeasuredSpeed):
        assert "predicted exact " in choice
        assert same


def test_no_memory_for_trials_means_exact_mode(two_ranks: Ranks) -> None:
    for choice, same in two_ranks.run(with_trials, without_memory):
        assert choice.startswith("exact: no memory is left for trials (trials want more than there is)")
        assert same
