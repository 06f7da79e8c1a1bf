"""A VAE that is given to torch.compile, in whole or in part, before or after: its calls give what they should."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from pictures import error
from ranks import Ranks
from torch.overrides import _get_current_function_mode_stack  # pyright: ignore[reportPrivateUsage]

import halovae
from halovae.base.compiled import as_written

LATENT = FAMILIES["kl"].latent()


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


@compiled
def beside(tensor: torch.Tensor) -> torch.Tensor:
    """A function that is compiled, in the file of a module that calls it."""
    return tensor * 1


class CallsCompiled(torch.nn.Identity):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return beside(input)


WAYS: dict[str, Callable[[Any], Any]] = {
    "the method": lambda vae: setattr(vae, "decode", compiled(vae.decode)),
    "the network": lambda vae: setattr(vae, "decoder", compiled(vae.decoder)),
    "the network in place": lambda vae: vae.decoder.compile(backend="eager"),
    "a function of a part": lambda vae: setattr(
        vae.decoder, "conv_act", torch.nn.Sequential(vae.decoder.conv_act, CallsCompiled())
    ),
}


def stance() -> str:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance  # pyright: ignore[reportPrivateUsage]


@torch.no_grad()
def each_way(rank: int) -> None:
    for way, compile_part in WAYS.items():
        vae = FAMILIES["kl"].build()
        expected = vae.decode(LATENT).sample
        compile_part(vae)
        own = vae.__dict__.get("decode")
        with halovae.parallelize(vae):
            for _ in range(2):
                assert error(vae.decode(LATENT).sample, expected) < 1e-5, way
            with pytest.raises(halovae.InputError, match=r"takes no 3 channels.*: use 4"):
                vae.decode(LATENT[:, :3])
            assert error(vae.decode(LATENT).sample, expected) < 1e-5, way
        assert vae.__dict__.get("decode") is own
        assert stance() == "default"
        assert not _get_current_function_mode_stack()


def test_parts_that_are_compiled_run_as_they_are_written(two_ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="halovae"):
        each_way(0)
    notes = [record.message for record in caplog.records if record.name == "halovae"]
    assert len(notes) == len(WAYS)
    assert notes[0] == (
        "decode of AutoencoderKL is compiled, in whole or in part: halovae runs it as it is written, by its own kernels"
    )
    two_ranks.run(each_way)


@torch.no_grad()
def test_a_compiler_that_comes_later_leaves_calls_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    vae = FAMILIES["kl"].build()
    expected = vae.decode(LATENT).sample
    with halovae.optimize(vae) as handle:
        whole = compiled(vae)
        for decode in (compiled(vae.decode), compiled(lambda latent: vae.decode(latent)), whole.decode):
            for _ in range(2):
                assert error(decode(LATENT).sample, expected) < 1e-5
                assert handle.last is not None
                handle.last = None
    assert not [record for record in caplog.records if record.name == "halovae"]
    with halovae.optimize(whole) as handle:  # What is around the VAE is none.
        assert error(whole.decode(LATENT).sample, expected) < 1e-5
        assert handle.last is not None
    assert "decode" not in vae.__dict__


def test_the_last_one_to_leave_puts_the_compiler_back() -> None:
    first, second = as_written(), as_written()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == "default"
