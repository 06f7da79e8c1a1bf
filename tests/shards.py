"""Run a function of tensors whole and on shards, with threads as ranks: what the tests of operator rules share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import strategies as st
from threads import ThreadComm, run_threads
from torch import Tensor

from halovae.base.trees import map_tensors
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh
from halovae.exact.run import Bounds, gather, scatter
from halovae.exact.shard_mode import ShardMode
from halovae.kernels.fast_mode import FastMode, finished

EXACT = 1e-12
"""Tolerance relative to the largest value, in float64: only the order of summation may differ."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_shards(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], bounds: Bounds, fast: bool = False
) -> list[Any]:
    """Every rank's gathered result of `function` on shards of the inputs; `fast`: with the kernels of fast mode."""
    shape = len(bounds[0]) - 1, len(bounds[1]) - 1

    def work(comm: ThreadComm) -> Any:
        mesh = Mesh(comm, shape)
        shards = [scatter(mesh, tensor, bounds) for tensor in inputs]
        with FastMode() if fast else nullcontext(), ShardMode(mesh):
            result = function(*shards)
        return map_tensors(lambda t: gather(mesh, mark(finished(t), layout_of(t))), result)

    return run_threads(shape[0] * shape[1], work)


def assert_same(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
        return
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = max(1e-30, expected.abs().max().item()) if expected.is_floating_point() else 1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def check(function: Callable[..., Any], inputs: tuple[Tensor, ...], bounds: Bounds, tolerance: float = EXACT) -> None:
    """The result on shards is the result on the whole, on every rank."""
    with torch.no_grad():
        expected = function(*(tensor.clone() for tensor in inputs))
    for found in on_shards(function, tuple(tensor.clone() for tensor in inputs), bounds):
        assert_same(found, expected, tolerance)


@st.composite
def axis_bounds(draw: st.DrawFn, least: int = 2, most: int = 6, parts: int = 3, ratio: int = 1) -> tuple[int, ...]:
    """Where an axis is cut: one to `parts` uneven parts of at least `least` times `ratio` positions."""
    sizes = draw(st.lists(st.integers(least, most), min_size=1, max_size=parts))
    return tuple(ratio * sum(sizes[:i]) for i in range(len(sizes) + 1))


@st.composite
def picture_bounds(draw: st.DrawFn, least: int = 2, most: int = 6, ratio: int = 1) -> Bounds:
    """A grid of two to six shards."""
    rows = draw(axis_bounds(least, most, 3, ratio))
    cols = draw(axis_bounds(least, most, 2, ratio).filter(lambda b: len(b) > 2 or len(rows) > 2))
    return rows, cols


GRID: Bounds = ((0, 4, 12), (0, 6, 10, 18))
"""Two rows and three columns of uneven shards."""

SIZES = {"h": 12, "w": 18}


def image() -> Tensor:
    return draw(2, 4, 12, 18)


def video() -> Tensor:
    return draw(1, 4, 3, 12, 18)


def tokens(x: Tensor) -> Tensor:
    """[batch, height * width, channels]"""
    return x.flatten(2).transpose(1, 2)


def heads(x: Tensor) -> Tensor:
    """[batch, 2 heads, height * width, channels of a head]"""
    return tokens(x).unflatten(2, (2, 2)).transpose(1, 2)
