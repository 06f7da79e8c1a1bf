"""What transformers do between their products, in one pass each: Triton's interpreter runs the kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import MiniMaxH3VideoViTDecoder3d
from torch import Tensor

pytest.importorskip("triton")

from halovae.kernels.fast_mode import FastMode
from halovae.kernels.gpu import support, triton_tokens
from halovae.kernels.lazy import tokens as lazy
from halovae.kernels.lazy.deferred import computed, recipe_of

# Sums of a few hundred float32 squares, added in another order.
TOLERANCE = 1e-5


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules take the kernels of an accelerator, which the interpreter runs."""
    monkeypatch.setattr(support, "supports", lambda _: True)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("channels", [16, 24])
def test_a_sum_and_its_norm_in_one_pass(channels: int):
    x, y, scale, weight = tokens(7, channels), tokens(7, channels, seed=1), tokens(channels), tokens(channels, seed=2)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    triton_tokens.add_and_norm(x, other=y, scale=scale, total=total, normed=normed, weight=weight, eps=1e-5)
    assert error(total, x + y * scale) < TOLERANCE
    assert error(normed, F.rms_norm(x + y * scale, (channels,), weight, 1e-5)) < TOLERANCE


def test_a_gate_of_the_other_half():
    x, y = tokens(5, 3, 24).chunk(2, -1)
    out = torch.empty(5, 3, 12)
    triton_tokens.gate(x.flatten(0, 1), y.flatten(0, 1), out.view(15, 12))
    assert error(out, x * F.silu(y)) < TOLERANCE


def test_a_layer_waits_for_the_next_norm(as_on_gpu: None):
    x, y, scale, weight = tokens(2, 5, 16), tokens(2, 5, 16, seed=1), tokens(16), tokens(16, seed=2)
    with FastMode():
        total = x + y * scale
        normed = F.rms_norm(total.float(), (16,), weight, 1e-5).to(torch.bfloat16)
        assert isinstance(recipe_of(total), lazy.Sum)
        assert isinstance(recipe_of(normed), lazy.Normed)
        assert normed.dtype == torch.bfloat16
        found = computed(normed)
        assert recipe_of(total) is None  # the same pass has written it
    assert error(computed(total), x + y * scale) < TOLERANCE
    expected = F.rms_norm(x + y * scale, (16,), weight, 1e-5).to(torch.bfloat16)
    assert (found.float() - expected.float()).abs().max() <= 2**-7 * expected.abs().max()  # one rounding apart


@pytest.mark.parametrize("alike", [True, False], ids=["same angles", "own angles"])
def test_tokens_turn_as_they_are_normed(alike: bool, as_on_gpu: None):
    x, weight = tokens(2, 5, 3, 16), tokens(16, seed=2)
    angles = tokens(1 if alike else 2, 5, 1, 12, seed=3)
    cosines, sines = angles.cos(), angles.sin()

    def call() -> Tensor:
        normed = F.rms_norm(x.float(), (16,), weight, 1e-5).to(x.dtype)
        turning, others = normed[..., :12], normed[..., 12:]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat([turning * cosines + torch.cat([-second, first], dim=-1) * sines, others], dim=-1)

    with FastMode():
        found = call()
        assert isinstance(recipe_of(found), lazy.Turned)
    assert error(computed(found), call()) < TOLERANCE


def test_parts_that_do_not_turn(as_on_gpu: None):
    x, factor = tokens(2, 5, 3, 16), tokens(1, 5, 1, 16, seed=1)

    def calls() -> list[Tensor]:
        normed = F.rms_norm(x, (16,), None, 1e-5)
        first, second = normed.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        return [
            torch.cat([second, first], dim=-1), torch.cat([-first, second], dim=-1), swapped, swapped * factor,
            normed * factor + swapped * factor, first * factor[..., :8], -second, normed[..., 4:8],
            torch.cat([swapped, first], dim=-1), torch.cat([second.neg().neg(), first], dim=-1),
        ]  # fmt: skip

    with FastMode():
        found = calls()
    for one, expected in zip(found, calls(), strict=True):
        assert error(computed(one), expected) < TOLERANCE


def test_what_reads_a_tensor_is_computed_before_that_is_written(as_on_gpu: None):
    x, y, scale = tokens(1, 4, 8), tokens(1, 4, 8, seed=1), tokens(8)
    before = x + y * scale
    normed_before = F.rms_norm(before, (8,), None, 1e-5)
    with FastMode():
        total = x + y * scale
        normed = F.rms_norm(total, (8,), None, 1e-5)
        y.zero_()
    assert error(computed(total), before) < TOLERANCE
    assert error(computed(normed), normed_before) < TOLERANCE


def test_parameters_and_angles_with_gaps(as_on_gpu: None):
    """The kernels read them as dense rows."""
    x, y, gaps = tokens(2, 5, 16), tokens(2, 5, 16, seed=1), tokens(32, seed=2)[::2]
    heads, angles = tokens(2, 5, 3, 16), tokens(1, 5, 1, 24, seed=3)[..., :12]

    def calls() -> list[Tensor]:
        normed = F.rms_norm(heads, (16,), None, 1e-5)
        turning = normed[..., :12]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * angles + torch.cat([-second, first], dim=-1) * angles
        return [x + y * gaps, F.rms_norm(x, (16,), gaps, 1e-5), torch.cat([turned, normed[..., 12:]], dim=-1)]

    with FastMode():
        found = calls()
    for one, expected in zip(found, calls(), strict=True):
        assert error(computed(one), expected) < TOLERANCE


def test_a_parameter_that_is_written_meanwhile(as_on_gpu: None):
    x, scale = tokens(1, 4, 8), tokens(8, seed=1)
    before = x + x * scale
    with FastMode():
        total = x + x * scale
        scale.zero_()
    assert error(computed(total), before) < TOLERANCE


def test_a_parameter_keeps_its_gradient(as_on_gpu: None):
    x, scale = tokens(1, 4, 8), tokens(8, seed=1).requires_grad_()
    with FastMode():
        assert (x * scale).requires_grad
        assert F.rms_norm(x, (8,), scale, 1e-5).requires_grad


@pytest.mark.parametrize("call", [
    lambda x: x * F.silu(x[..., :8]),  # a gate for every head is no gate of the same shape
    lambda x: F.silu(x) + 1,
    lambda x: (x * torch.ones(8)).sum(),
    lambda x: F.rms_norm(x.transpose(1, 2), (4,), None, 1e-5),
    lambda x: F.rms_norm(x, (8,)),
])  # fmt: skip
def test_what_is_something_else_is_torchs(call: Any, as_on_gpu: None):
    x = tokens(2, 4, 8)
    with FastMode():
        found = call(x)
    assert error(computed(found), call(x)) < TOLERANCE


def test_a_decoder_of_tokens(as_on_gpu: None):
    torch.manual_seed(0)
    decoder = MiniMaxH3VideoViTDecoder3d(
        in_channels=4, patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=16
    ).eval()
    for name, weight in decoder.named_parameters():
        if "scale" in name:
            torch.nn.init.normal_(weight)
    latents = tokens(2, 4, 3, 4, 5)
    with torch.no_grad():
        expected = decoder(latents)
        with FastMode():
            found = decoder(latents)
    assert error(computed(found), expected) < TOLERANCE
