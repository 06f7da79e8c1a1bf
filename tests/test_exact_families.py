"""Every family, encode and decode, on every kind of cut: the sharded result is the un-parallel one in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Family, run_decode, run_encode
from ranks import Ranks

import halovae

HALVES = [
    (name, half) for name, family in FAMILIES.items() for half in ("encode", "decode") if getattr(family, half)
]


def _run(family: Family, half: str, vae: Any) -> torch.Tensor:
    if half == "encode":
        return run_encode(vae, family.sample(torch.float64))
    return run_decode(family, vae, family.latent(torch.float64))


def compare(rank: int, name: str, half: str, axis: Any) -> tuple[float, str]:
    """Largest difference relative to the largest value, and what the call did."""
    family = FAMILIES[name]
    vae = family.build().to(torch.float64)
    vae.use_tiling = False
    expected = _run(family, half, vae)
    vae.use_tiling = True  # exact mode has to bypass it
    with halovae.parallelize(vae, axis=axis) as handle:
        found = _run(family, half, vae)
    assert found.shape == expected.shape
    assert handle.last is not None
    return ((found - expected).abs().max() / expected.abs().max()).item(), str(handle.last.shape)


@pytest.mark.parametrize(("name", "half"), HALVES)
@pytest.mark.parametrize("axis", ["height", "width"])
def test_two_ranks(two_ranks: Ranks, name: str, half: str, axis: str) -> None:
    family = FAMILIES[name]
    if not getattr(family, f"exact_{half}"):
        with pytest.raises(AssertionError, match="NotExactError"):
            two_ranks.run(compare, name, half, axis)
        return
    for error, shape in two_ranks.run(compare, name, half, axis):
        assert shape == ("(2, 1)" if axis == "height" else "(1, 2)")
        assert error <= getattr(family, f"{half}_tolerance")
