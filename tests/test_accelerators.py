"""Ranks that have an accelerator each, and its own backend between them. Left out where there are fewer than two."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import EXACT, FAMILIES, run_half
from pictures import error
from ranks import ENDED, Ranks
from torch import Tensor

import halovae
from halovae.base.errors import RankFailedError
from halovae.calls.device_graphs import Tape
from halovae.comm import default_device

pytestmark = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="there are no two accelerators")
SOON = 10.0


@pytest.fixture(scope="module")
def devices() -> Iterator[Ranks]:
    ranks = Ranks(2, device=str(torch.accelerator.current_accelerator()))
    yield ranks
    ranks.close()


def placed(name: str, half: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    family, device = FAMILIES[name], default_device()
    tensor = family.sample(dtype) if half == "encode" else family.latent(dtype)
    return family.build().to(device, dtype), tensor.to(device)


def exact(rank: int, name: str, half: str, axis: Any, graphs: bool) -> None:
    vae, tensor = placed(name, half)
    expected = run_half(name, vae, half, tensor)
    with halovae.parallelize(vae, axis=axis, options=halovae.Options(graphs=graphs)) as handle:
        for turn in range(5 if graphs else 2):
            found = run_half(name, vae, half, tensor)
            assert error(found, expected) <= max(EXACT, getattr(FAMILIES[name], f"{half}_tolerance"))
            assert handle.last is not None
            assert handle.last.messages
            assert handle.last.replayed == (graphs and turn > 1)
            if handle.last.replayed and default_device().type == "cuda":
                assert re.fullmatch(r"1 graph with \d+ exchanges inside", handle.last.recording)
    assert found.device == tensor.device


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("name", ["wan21", "wan22", "kl", "hunyuan_video", "dc"])
def test_exact(devices: Ranks, name: str, half: str, axis: str) -> None:
    devices.run(exact, name, half, axis, False)


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("name", ["wan21", "kl"])
def test_replayed(devices: Ranks, name: str, half: str) -> None:
    devices.run(exact, name, half, "auto", True)


def low(rank: int, half: str) -> None:
    """Where the kernels for accelerators are at work; neither way may be farther from the truth."""
    vae, tensor = placed("wan21", half, torch.bfloat16)
    truth = run_half("wan21", placed("wan21", half)[0].to(torch.bfloat16).double(), half, tensor.double())
    plain = run_half("wan21", vae, half, tensor)
    with halovae.parallelize(vae):
        found = run_half("wan21", vae, half, tensor)
    assert (found.double() - truth).norm() <= 1.5 * (plain.double() - truth).norm()


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_low_precision(devices: Ranks, half: str) -> None:
    devices.run(low, half)


def fails_and_goes_on(rank: int) -> list[float]:
    vae, latent = placed("kl", "decode")
    expected, seconds = run_half("kl", vae, "decode", latent), list[float]()
    with halovae.parallelize(vae, verify=False, options=halovae.Options(alone=False)):
        run_half("kl", vae, "decode", latent)
        for number in range(6):
            handle = vae.decoder.up_blocks[0].register_forward_pre_hook(_raise) if rank == number % 2 else None
            started = time.monotonic()
            with pytest.raises(ZeroDivisionError if handle else RankFailedError):
                run_half("kl", vae, "decode", latent)
            seconds.append(time.monotonic() - started)
            if handle:
                handle.remove()
            assert error(run_half("kl", vae, "decode", latent), expected) <= EXACT
    return seconds


def _raise(*args: Any) -> None:
    raise ZeroDivisionError("the weather is bad")


def test_a_failure_is_raised_on_all_and_the_next_call_is_right(devices: Ranks) -> None:
    assert max(max(each) for each in devices.run(fails_and_goes_on)) < SOON


def dies(rank: int, graphs: bool) -> float:
    vae, latent = placed("kl", "decode")
    with halovae.parallelize(vae, verify=False, options=halovae.Options(graphs=graphs, alone=False)):
        for _ in range(3):
            run_half("kl", vae, "decode", latent)
        if rank == 1 and graphs:  # When the other one's device waits for it.
            Tape.replay = lambda *_: time.sleep(1) or os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 1:
            vae.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        started = time.monotonic()
        with pytest.raises(RankFailedError, match="its process has ended"):
            run_half("kl", vae, "decode", latent)
        return time.monotonic() - started


@pytest.mark.parametrize("graphs", [False, True])
def test_a_killed_rank_is_told(graphs: bool) -> None:
    ranks = Ranks(2, device=str(torch.accelerator.current_accelerator()))
    try:
        ranks.begin(dies, graphs)
        ok, seconds = ranks.answer(0)
        assert ok, seconds
        assert seconds < SOON
        assert ranks.answer(1) == (False, ENDED)
    finally:
        ranks.kill()
