"""Which kernels are fastest is tried out, once, and by all ranks together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES
from ranks import Ranks

import halovae
from halovae.kernels import trials
from halovae.kernels.kept import Kept


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trials, "_timed_here", {})
    with Kept().in_use():
        yield


def test_the_faster_way_is_found_and_not_tried_again() -> None:
    prepared = []

    def ways() -> tuple[trials.Way, trials.Way]:
        prepared.append(True)
        return lambda: sum(range(200_000)), lambda: sum(range(2_000))

    assert trials.gain("sums", ways) > 10
    assert trials.gain("sums", ways) == trials.known()["sums"]
    with Kept().in_use():
        assert trials.known() == {}  # Of another handle, which begins with what this process has timed.
        assert trials.gain("sums", ways) > 10
        trials.adopt([{"sums": 1.0}])
    assert trials.gain("sums", ways) > 10
    assert len(prepared) == 1


def test_waiting_is_no_work() -> None:
    assert trials.gain("waits", lambda: (lambda: time.sleep(0.01), lambda: sum(range(200_000)))) < 1


def test_a_clock_that_stands_still_divides_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    assert trials.gain("too short", lambda: (lambda: None, lambda: None)) == 1.0


def test_what_several_found_out_is_put_together() -> None:
    assert trials.adopt([{"a": 2.0, "b": 3.0}, {"a": 0.5}, {"c": 5.0}])
    known = trials.known()
    assert {name: round(gain, 9) for name, gain in known.items()} == {"a": 1.0, "b": 3.0, "c": 5.0}
    assert not trials.adopt([known, known])  # All agree already, to the bit.


@torch.no_grad()
def answers(rank: int) -> trials.Gains:
    """What a rank knows after a call."""
    vae = FAMILIES["wan21"].build()
    handle = halovae.parallelize(vae, verify=False)
    gains = handle._kept.gains  # pyright: ignore[reportPrivateUsage]
    gains["all ask that"] = math.exp(rank)
    gains[f"rank {rank} asks that"] = 1.0 + rank
    picture = torch.randn(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0))
    first = vae.encode(picture).latent_dist.mean
    known = dict(gains)
    second = vae.encode(picture).latent_dist.mean
    assert gains == known
    assert torch.allclose(first, second, atol=1e-5)  # Other kernels may round otherwise.
    handle.restore()
    return known


def test_ranks_choose_alike(two_ranks: Ranks) -> None:
    one, other = two_ranks.run(answers)
    assert one == other
    assert one["all ask that"] == pytest.approx(math.exp(0.5))
    assert one["rank 1 asks that"] == 2.0
