"""`optimize`: every VAE gives the numbers of diffusers on one process, faster kernels or not."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, run_decode, run_encode

import halovae
from halovae.kernels.lazy.deferred import Deferred

HALVES = [(name, half) for name, family in FAMILIES.items() for half in ("encode", "decode")
          if getattr(family, half) and getattr(family, f"exact_{half}")]  # fmt: skip


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_equals_diffusers(name: str, half: str) -> None:
    family = FAMILIES[name]
    vae = family.build().to(torch.float64)
    vae.use_tiling = False  # One comes tiled, and then runs as it is.

    def run() -> torch.Tensor:
        if half == "encode":
            return run_encode(vae, family.sample(torch.float64))
        return run_decode(family, vae, family.latent(torch.float64))

    expected = run()
    with halovae.optimize(vae) as handle:
        found = run()
        assert handle.last is not None
        assert handle.last.messages == 0
    assert not isinstance(found, Deferred)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= getattr(family, f"{half}_tolerance")


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
