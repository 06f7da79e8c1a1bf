"""Use as a service has it: threads, many calls, nothing that piles up; and values that are no numbers."""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import random
import threading
import time
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis.core
import pytest
import torch
from counting import RANDOM_SHAPES
from families import EXACT, FAMILIES, run_decode, run_encode
from pictures import error, kl, latents, pixels, raises
from ranks import Ranks
from tiles import CUTS
from torch import nn

import halovae
from halovae.base.errors import InputError
from halovae.base.memory import PeakMemory


def held() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


class OneConvolution(torch.nn.Module):
    """The least that has an inside to exchange halos in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.constant_(self.layer.weight, 0.1)
        torch.nn.init.zeros_(self.layer.bias)
        self.requires_grad_(False)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.layer(z)


def many_calls(rank: int, calls: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Threads and files before and after, and by how much the memory grew from the half of the calls on."""
    vae, z = OneConvolution(), torch.ones(1, 3, 8, 8)
    with halovae.parallelize(vae, verify=False, options=halovae.Options(alone=False)):
        vae.decode(z)
        before = held()
        for _ in range(calls // 2):
            vae.decode(z)
        gc.collect()
        memory = PeakMemory(torch.device("cpu"))
        for _ in range(calls // 2):
            vae.decode(z)
        return before, held(), memory.growth


def test_hundreds_of_calls_leak_nothing(two_ranks: Ranks) -> None:
    for before, after, growth in two_ranks.run(many_calls, 500):
        assert after <= before
        assert growth < 8 * 2**20


def many_handles(rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    vae, z = OneConvolution(), torch.ones(1, 3, 8, 8)
    for number in range(12):
        if number == 2:
            before = held()
        with halovae.parallelize(vae, verify=False):
            vae.decode(z)
    deadline = time.monotonic() + 10
    while held() > before and time.monotonic() < deadline:  # The backend closes its sockets in threads of its own.
        time.sleep(0.1)
    return before, held()


def test_handles_leave_nothing_behind(two_ranks: Ranks) -> None:
    for before, after in two_ranks.run(many_handles):
        assert after <= before


def restored_in_a_call(rank: int) -> None:
    """`restore` from another thread waits until the call is over."""
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    handle = halovae.parallelize(vae, verify=False)
    kept, inside, over = vae.decode, threading.Event(), threading.Event()

    def slow(module: object, args: object) -> None:
        inside.set()
        time.sleep(0.5)

    hook = vae.decoder.conv_in.register_forward_pre_hook(slow)

    def restore() -> None:
        inside.wait()
        handle.restore()
        over.set()

    thread = threading.Thread(target=restore)
    thread.start()
    assert error(vae.decode(z)[0], expected) <= EXACT
    thread.join(20)
    assert over.is_set()
    hook.remove()
    assert "decode" not in vae.__dict__
    assert torch.equal(kept(z)[0], expected)  # Who has kept the method gets the VAE's own.


def test_restore_waits_for_a_call(two_ranks: Ranks) -> None:
    two_ranks.run(restored_in_a_call)


def anew(rank: int) -> None:
    vae, x, z = kl(), pixels(), latents()
    pipeline, moments, decoded = SimpleNamespace(vae=vae), vae.encode(x)[0].parameters, vae.decode(z)[0]

    def check(handle: halovae.Handle, half: str, shape: tuple[int, int]) -> None:
        found = vae.decode(z)[0] if half == "decode" else vae.encode(x)[0].parameters
        assert error(found, decoded if half == "decode" else moments) <= EXACT
        assert handle.last is not None
        assert (handle.last.half, handle.last.shape) == (half, shape)

    assert halovae.summary(pipeline) == "AutoencoderKL: encode and decode are its own"
    first = halovae.parallelize(vae, axis="height")
    check(first, "decode", (2, 1))
    kept = vae.decode
    with raises(InputError, "axis is"):
        halovae.parallelize(vae, axis="depth")
    second = halovae.parallelize(vae, axis="width", halves=["decode"])
    check(second, "decode", (1, 2))
    check(first, "encode", (2, 1))
    assert torch.equal(kept(z)[0], decoded)  # Who has kept the old one gets the VAE's own.
    assert [line.split()[-1] for line in halovae.summary(vae).splitlines() if "halves" in line] == ["encode", "decode"]
    first.restore()
    check(second, "decode", (1, 2))
    with halovae.parallelize(pipeline, axis="height") as third:
        check(third, "decode", (2, 1))
        second.restore()  # It has nothing left to restore.
        check(third, "decode", (2, 1))

        parallel = vae.decode
        vae.decode = functools.wraps(parallel)(lambda *args: parallel(*args))
        with raises(InputError, r"something is wrapped around it: call halovae\.restore"):
            halovae.parallelize(vae)
        halovae.restore(pipeline)
        assert torch.equal(vae.decode(z)[0], decoded)
        fourth = halovae.parallelize(vae, axis="height")  # With what is wrapped around as the VAE's own.
        check(fourth, "decode", (2, 1))
        halovae.restore(vae)
        del vae.decode
    assert not {"encode", "decode", "__getstate__"} & vars(vae).keys()
    with raises(InputError, "there is no VAE"):
        halovae.restore("vae")


def test_a_second_call_takes_the_place_of_the_first(two_ranks: Ranks) -> None:
    two_ranks.run(anew)


# ---- copies ----------------------------------------------------------------------------------------------------------


def through_torch(vae: Any) -> Any:
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae)), through_torch])
def test_copies_have_their_own_methods_and_weights(copied: Callable[[Any], Any]) -> None:
    vae, z = kl().requires_grad_(False), latents()
    expected = vae.decode(z)[0]
    with halovae.optimize(vae) as handle:
        vae.decode(z)
        other = copied(SimpleNamespace(vae=vae)).vae
        assert vars(other).keys() == vars(kl()).keys()
        assert torch.equal(other.decode(z)[0], expected)
        other.decoder.conv_out.bias += 1
        assert error(other.decode(z)[0], expected + 1) <= EXACT
        assert error(vae.decode(z)[0], expected) <= EXACT
        assert b"halovae" not in pickle.dumps(vae)  # It can be loaded without.
        with pytest.raises(InputError, match="a handle can't be copied"):
            copied(handle)
        if copied is not through_torch:
            assert torch.equal(copied(vae.decode)(z)[0], expected)
        vae = copied(vae)
    with halovae.optimize(vae):
        assert error(copied(vae).decode(z)[0], expected) == 0


def test_copies_have_what_was_there_before() -> None:
    """What compilers and hooks had put on the VAE; and of a VAE without methods, its modules' own."""
    vae, z = kl(), latents()
    vae.decode = types.MethodType(lambda self, z: 2 * type(self).decode(self, z)[0], vae)  # As accelerate's hooks.
    expected = vae.decode(z)
    with halovae.optimize(vae):
        other = copy.deepcopy(vae)
    assert other.decode.__self__ is other
    assert torch.equal(other.decode(z), expected)

    bare = nn.Module()
    bare.decoder = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double()
    with halovae.optimize(bare):
        other = copy.deepcopy(bare)
        assert "forward" not in vars(other.decoder)
        assert torch.equal(other.decoder(z), type(bare.decoder).forward(bare.decoder, z))


# ---- values that are no numbers --------------------------------------------------------------------------------------


def no_numbers(rank: int, name: str, value: float, mode: str) -> None:
    """What is not finite in the result is so for the VAE alone too, and at the same places."""
    family = FAMILIES[name]
    tiled = mode == "tile"
    vae = (CUTS[name].build() if tiled else family.build()).to(torch.float64)
    sample = CUTS[name].picture("encode").double() if tiled else family.sample(torch.float64)
    if tiled:
        vae.use_tiling = True
    sample[..., sample.shape[-2] // 2, 3] = value
    expected = vae.encode(sample)[0]
    expected = expected if torch.is_tensor(expected) else expected.parameters
    axis = "auto" if tiled else "height"
    with halovae.parallelize(vae, mode=mode, axis=axis, verify=False) as handle:
        found = vae.encode(sample)[0]
    assert handle.last is not None
    assert handle.last.mode == mode
    assert not tiled or handle.last.tiles > 1
    found = found if torch.is_tensor(found) else found.parameters
    assert not bool(torch.isfinite(expected).all())
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    if bool(finite.any()):
        assert error(found[finite], expected[finite]) <= family.encode_tolerance


@pytest.mark.parametrize("mode", ["exact", "tile"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["kl", "tiny", "wan21"])
def test_nan_and_inf_stay_where_they_would_be(two_ranks: Ranks, name: str, value: float, mode: str) -> None:
    two_ranks.run(no_numbers, name, value, mode)


# ---- many shapes -----------------------------------------------------------------------------------------------------


def many_shapes(rank: int, seed: int, name: str, axis: str, shapes: int) -> None:
    """Random sizes and batches, each half compared with the VAE alone."""
    chance, family = random.Random(seed), FAMILIES[name]
    alone, vae = (family.build(3).to(torch.float64) for _ in range(2))
    with halovae.parallelize(vae, axis=axis, verify=False):
        for number in range(shapes):
            rows, cols, batch = chance.randint(1, 9), chance.randint(1, 9), chance.randint(1, 2)
            off = chance.choice((0, 0, chance.randint(1, 7)))
            noise = torch.Generator().manual_seed(number)
            sample, latent = (batch, *family.sample_shape[1:-2]), (batch, *family.latent_shape[1:-2])
            x = torch.randn(*sample, 8 * rows + off, 8 * cols + off, dtype=torch.float64, generator=noise)
            z = torch.randn(*latent, rows, cols, dtype=torch.float64, generator=noise)
            words = f"seed {seed}, shape {number}: {tuple(x.shape)}, {name}, axis {axis}"
            assert error(run_encode(vae, x), run_encode(alone, x)) <= EXACT, words
            assert error(run_decode(family, vae, z), run_decode(family, alone, z)) <= EXACT, words


@pytest.mark.parametrize(("name", "axis"), [("kl", "auto"), ("tiny", "height"), ("flux2", "width")])
def test_many_shapes_end_to_end(two_ranks: Ranks, name: str, axis: str, record_property: Callable[..., None]) -> None:
    """The seed is the one that the run prints at its beginning."""
    assert hypothesis.core.global_force_seed is not None
    two_ranks.run(many_shapes, hypothesis.core.global_force_seed, name, axis, 8)
    record_property(RANDOM_SHAPES, 2 * 8)  # Of both halves.
