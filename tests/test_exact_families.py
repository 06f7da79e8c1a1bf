"""Every family, encode and decode, on every kind of cut: the sharded result is the un-parallel one in float64."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, run_decode, run_encode
from ranks import Ranks

import halovae

CUTS: list[tuple[Any, int]] = [("height", 2), ("width", 3), ((2, 2), 4)]
"""Axis and ranks at work; the others of the four wait and share the result."""

HALVES = [(name, half) for name, family in FAMILIES.items() for half in ("encode", "decode") if getattr(family, half)]


def _run(family: Family, half: str, vae: Any) -> torch.Tensor:
    if half == "encode":
        return run_encode(vae, family.sample(torch.float64))
    return run_decode(family, vae, family.latent(torch.float64))


def run_cuts(rank: int, name: str, half: str) -> list[tuple[float, str, tuple[int, int]]]:
    """Per cut: largest error relative to the largest value (on the first rank), a hash of the result, the grid."""
    family = FAMILIES[name]
    vae = family.build().to(torch.float64)
    outcomes: list[tuple[torch.Tensor, tuple[int, int]]] = []
    vae.use_tiling = True  # exact mode has to bypass it
    for axis, size in CUTS:
        # The probe is for the first cut: it triples the work, and other tests show that it finds mistakes.
        with halovae.parallelize(vae, untiled=True, axis=axis, size=size, verify=axis == "height") as handle:
            result = _run(family, half, vae)
            assert handle.last is not None
            outcomes.append((result, handle.last.shape))
    vae.use_tiling = False
    expected = _run(family, half, vae) if rank == 0 else None
    return [(_error(found, expected), _hash(found), shape) for found, shape in outcomes]


def _error(found: torch.Tensor, expected: torch.Tensor | None) -> float:
    if expected is None:
        return 0.0
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_every_cut_equals_the_un_parallel_result(four_ranks: Ranks, name: str, half: str) -> None:
    family = FAMILIES[name]
    if not getattr(family, f"exact_{half}"):
        with pytest.raises(AssertionError, match="NotExactError"):
            four_ranks.run(run_cuts, name, half)
        return
    per_rank = four_ranks.run(run_cuts, name, half)
    for cut, outcomes in enumerate(zip(*per_rank, strict=True)):
        error, first_hash, shape = outcomes[0]
        assert shape[0] * shape[1] >= 2, f"{CUTS[cut]} was not cut"
        assert error <= getattr(family, f"{half}_tolerance"), CUTS[cut]
        assert all(other == first_hash for _, other, _ in outcomes), f"ranks hold different results on {CUTS[cut]}"
