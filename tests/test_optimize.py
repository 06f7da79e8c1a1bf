"""`optimize`: every VAE gives the numbers of diffusers on one process, faster kernels or not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import FAMILIES, plain, run_decode, run_encode, run_half_in_float64
from pictures import error

import halovae
from halovae.base.errors import InputError
from halovae.kernels.lazy.deferred import Deferred

HALVES = [(name, half) for name, family in FAMILIES.items() for half in ("encode", "decode")
          if getattr(family, half) and getattr(family, f"exact_{half}")]  # fmt: skip


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_equals_diffusers(name: str, half: str) -> None:
    vae, expected = FAMILIES[name].build().to(torch.float64), plain(name, half)
    vae.use_tiling = False  # One comes tiled, and then runs as it is.
    with halovae.optimize(vae) as handle:
        found = run_half_in_float64(name, vae, half)
        assert handle.last is not None
        assert handle.last.messages == 0
    assert not isinstance(found, Deferred)
    assert found.is_contiguous()
    assert error(found, expected) <= getattr(FAMILIES[name], f"{half}_tolerance")


def test_low_precision_is_no_farther_from_the_truth() -> None:
    """Than diffusers itself, but for a tenth: the roundings are others, not more."""
    family = FAMILIES["wan21"]
    vae = family.build().to(torch.bfloat16)
    truth = run_encode(family.build().to(torch.bfloat16).double(), family.sample(torch.bfloat16).double())
    own = run_encode(vae, family.sample(torch.bfloat16))
    with halovae.optimize(vae):
        ours = run_encode(vae, family.sample(torch.bfloat16))
    errors = [(found.double() - truth).norm() / truth.norm() for found in (own, ours)]
    assert errors[1] <= 1.1 * errors[0]


def test_restore_gives_the_own_result_back() -> None:
    family = FAMILIES["kl"]
    vae = family.build()
    before = run_encode(vae, family.sample())
    halovae.optimize(vae).restore()
    assert torch.equal(run_encode(vae, family.sample()), before)
    assert "encode" not in vae.__dict__


# ---- a number format for each half -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "vq", "consistency", "qwenimage", "vidtok"])
def test_each_half_runs_in_its_own_dtype(name: str) -> None:
    """As a VAE of that dtype does; weights are there once, and as they were after `restore`."""
    family = FAMILIES[name]
    vae, wide = family.build(), family.build().double()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    encoded, decoded = run_encode(wide, family.sample(torch.float64)), run_decode(family, vae, family.latent())
    handle = halovae.optimize(vae, dtype={"encode": torch.float64})
    found = run_encode(vae, family.sample(torch.float64).to(torch.bfloat16).double())
    exact = run_encode(wide, family.sample(torch.float64).to(torch.bfloat16).double())
    assert found.dtype == torch.float64
    assert (found - exact).abs().max() <= family.encode_tolerance * exact.abs().max()
    # The other half takes what the pipeline casts to `vae.dtype`, which is now that of encode.
    found = run_decode(family, vae, family.latent(torch.float64))
    assert found.dtype == torch.float32
    assert (found - decoded).abs().max() <= 1e-4 * decoded.abs().max()
    assert run_encode(vae, family.sample()).dtype == encoded.dtype
    assert {weight.dtype for weight in vae.encoder.parameters()} == {torch.float64}
    assert {weight.dtype for weight in vae.state_dict().values()} <= {torch.float64, torch.float32, torch.int64}
    assert "encode float64, decode float32" in halovae.summary(vae)
    handle.restore()
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


class Shared(torch.nn.Module):
    """Both halves use one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.both = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def encode(self, x: torch.Tensor) -> Any:
        return self._with(self.encoder, x)

    def decode(self, z: torch.Tensor) -> Any:
        return self._with(self.decoder, z)

    def _with(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.both(layer(x))


def test_what_has_no_two_dtypes_is_refused() -> None:
    vae, x = Shared().requires_grad_(False), torch.ones(1, 3, 8, 8)
    for dtype, text in (
        ({"encode": torch.float64}, "encode float64, decode float32, but both halves of Shared use both.weight"),
        ({"encoder": torch.float64}, "a half of dtype is 'encoder': allowed are those that run, encode, decode"),
        (torch.int8, "dtype is torch.int8: allowed are torch.float32"),
    ):
        with pytest.raises(InputError, match=text):
            halovae.optimize(vae, dtype=dtype)
        assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
        assert "encode" not in vars(vae)
    with halovae.optimize(vae, dtype=torch.float64):
        assert vae.encode(x).dtype == vae.decode(x).dtype == torch.float64
    assert {weight.dtype for weight in vae.parameters()} == {torch.float32}

    vae = FAMILIES["kl"].build()
    halovae.optimize(vae, dtype={"decode": torch.float64})
    halovae.optimize(vae, dtype={"encode": torch.float64})
    assert (vae.encoder.conv_in.weight.dtype, vae.decoder.conv_in.weight.dtype) == (torch.float64, torch.float32)
    halovae.restore(vae)
    assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"weights that hooks fetch or cast, as those of .* in AutoencoderKL"):
        halovae.optimize(vae, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kl", "wan21"])
def test_what_the_vae_does_not_take_is_told_in_one_line(name: str) -> None:
    family = FAMILIES[name]
    vae, sample, latent = family.build(), family.sample(torch.float32), family.latent(torch.float32)
    other = sample[0] if sample.ndim == 5 else sample[:, :, None]
    with halovae.optimize(vae):
        for call, fault in (
            (lambda: vae.decode(latent[:, :3]), "decode itself takes no 3 channels: use 4"),
            (lambda: vae.encode(torch.cat([sample, sample], 1)), "encode itself takes no 6 channels: use 3"),
            (lambda: vae.decode(latent.double()), "decode itself takes no float64: use float32, as its weights are"),
            (lambda: vae.encode(sample.byte()), "encode itself takes no uint8: use float32, as its weights are"),
            (lambda: vae.encode(other), f"encode itself takes no {other.ndim}-dimensional picture: give (batch, "),
        ):  # fmt: skip
            with pytest.raises(halovae.InputError, match=re.escape(fault)) as caught:
                call()
            assert "\n" not in str(caught.value)

        def fail(*_: Any) -> None:
            raise RuntimeError("bad weather")

        hook = vae.decoder.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match=r"^bad weather$"):  # What fails for another reason says so itself.
            vae.decode(latent)
        hook.remove()
