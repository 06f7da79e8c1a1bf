"""Several threads at one VAE, and several handles at once: none sees what another has set, kept or left to be done."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES, run_half
from pictures import error
from tiles import CUTS, run_alone
from torch import Tensor

import halovae
from halovae.base.replaced import replaced


def in_another_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_the_other_half_goes_on_as_the_vae_is_set(mode: str) -> None:
    """While one half runs on shards, or its blending is put off."""
    cut = CUTS["kl"]
    vae, latent, picture = cut.build(), cut.picture("decode"), cut.picture("encode")
    expected = run_alone(cut, vae, "encode", picture)
    seen: list[Tensor] = []
    vae.decoder.conv_in.register_forward_hook(
        lambda *_: seen.append(in_another_thread(lambda: run_half("kl", vae, "encode", picture)))
    )
    with halovae.parallelize(vae, mode=mode, halves=("decode",)):
        run_half("kl", vae, "decode", latent)
    assert seen
    assert all(torch.equal(found, expected) for found in seen)
    assert vae.use_tiling is True
    assert not [name for name in vars(vae) if name.startswith("blend")]


def test_a_setting_of_one_thread() -> None:
    class Owner:
        on: Any = True

        def method(self) -> str:
            return "own"

    owner = Owner()
    owner.on = True
    with replaced(owner, "on", False, here=True), replaced(owner, "method", lambda: "here", here=True):
        assert not owner.on
        assert (owner.on, repr(owner.on), owner.method()) == (False, "False", "here")
        assert in_another_thread(lambda: (bool(owner.on), owner.on == True, owner.method())) == (True, True, "own")  # noqa: E712
        with replaced(owner, "on", True, here=True):
            assert owner.on
        assert not owner.on
        assert copy.deepcopy(owner).on is True
    assert vars(owner) == {"on": True}
    with replaced(owner, "on", False, here=True):
        owner.on = 3
    assert owner.on == 3
    # For all threads, beneath one for this thread; and what began first ends first.
    for here in (False, True):
        first, second = replaced(owner, "method", lambda: "first"), replaced(owner, "method", lambda: "2nd", here=here)
        first.__enter__()
        second.__enter__()
        assert (owner.method(), in_another_thread(owner.method)) == ("2nd", "first" if here else "2nd")
        first.__exit__(None, None, None)
        assert (owner.method(), in_another_thread(owner.method)) == ("2nd", "own" if here else "2nd")
        second.__exit__(None, None, None)
        assert vars(owner) == {"on": 3}


@torch.no_grad()
def test_two_handles_in_two_threads() -> None:
    """Of two VAEs, in turns that meet; one of them has its weights edited all the while."""
    pairs = {name: (FAMILIES[name].build(), FAMILIES[name].build()) for name in ("kl", "wan21")}
    meet = threading.Barrier(2)

    def run(name: str) -> float:
        (vae, own), latent, worst = pairs[name], FAMILIES[name].latent(), 0.0
        with halovae.optimize(vae):
            for number in range(6):
                if name == "kl":
                    for each in (vae, own):
                        each.decoder.conv_in.weight.data[0, number % 4] += 1
                expected = own.decode(latent).sample
                meet.wait(60)
                worst = max(worst, error(vae.decode(latent).sample, expected))
        return worst

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(run, pairs)) < 1e-4
