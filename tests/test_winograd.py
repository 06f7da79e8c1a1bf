"""Winograd's convolution: the numbers of plain torch, in float64, and wherever the kernels may take it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shards import EXACT, assert_same, draw
from test_kernels import CASES, CUTS, SHARDED, check_on_shards

from halovae.kernels.cpu import pieces, winograd
from halovae.kernels.fast_mode import FastMode, finished


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures too, in every dtype, in pieces of a few rows or columns."""
    monkeypatch.setattr(winograd, "pays", lambda *args: True)
    monkeypatch.setattr(winograd, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(pieces, "MANY", 1)


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 9), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("taps", [(), (1,), (3,)], ids=str)
def test_same_as_plain_torch(taps: tuple[int, ...], size: tuple[int, int]) -> None:
    weight, bias = draw(6, 4, *taps, 3, 3, seed=1), draw(6, seed=2)
    source = draw(2, 4, *([5] if taps else []), *size)
    expected = (F.conv3d if taps else F.conv2d)(source, weight, bias)
    out = torch.full_like(expected, torch.nan)
    winograd.convolve(source, winograd.sums_of(weight), bias, out)
    assert_same(out, expected, EXACT)


@pytest.mark.parametrize("name", CASES)
def test_in_place_of_any_convolution(name: str) -> None:
    function, shape = CASES[name]
    x = draw(*shape)
    with torch.no_grad():
        expected = function(x.clone())
        with FastMode():
            found = function(x.clone())
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    assert_same(tuple(map(finished, results)), expected, EXACT)


@pytest.mark.parametrize("bounds", CUTS, ids=str)
@pytest.mark.parametrize("name", SHARDED)
def test_on_shards(name: str, bounds: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check_on_shards(name, bounds)


def test_float32_rounds_no_worse_than_plain_torch() -> None:
    weight, source = draw(64, 64, 3, 3, dtype=torch.float32, seed=1), draw(1, 64, 18, 18, dtype=torch.float32)
    plain = F.conv2d(source, weight)
    out = torch.empty_like(plain)
    winograd.convolve(source, winograd.sums_of(weight), None, out)
    truth = F.conv2d(source.double(), weight.double())
    errors = [(found.double() - truth).norm() / truth.norm() for found in (plain, out)]
    # Half as much again is left for another processor's order of summation; here it is less than plain torch's.
    assert errors[1] <= 1.5 * errors[0]
    assert errors[1] > 0
