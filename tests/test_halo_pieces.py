"""A convolution beside a halo: which pieces of it are computed when, and that together they are all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shards import assert_same, draw
from torch import Tensor

from halovae.kernels import convolution
from halovae.kernels.cpu.pieces import Line
from halovae.kernels.fill import Fill
from halovae.kernels.lazy.deferred import Deferred
from halovae.kernels.lazy.joined import Halo, Joined

pytestmark = pytest.mark.usefixtures("small_pieces")
SIDES = pytest.mark.parametrize("side", ["before", "after"])
DIMS = pytest.mark.parametrize("dim", [3, 4], ids=["rows", "columns"])


def beside(
    side: str, dim: int, inside: Tensor, edge: Tensor, padding: int, fill: Fill, wait: Callable[[], None] = lambda: None
) -> tuple[Tensor, list[int]]:
    """`inside` with `edge` as its halo on one side, `padding` on the other and one across; and that as for `F.pad`."""
    first = side == "before"
    halo = Halo(dim, *((edge, None) if first else (None, edge)), wait)
    pads = {dim: (0, padding) if first else (padding, 0), 7 - dim: (1, 1)}
    recipe = Joined((inside,), halo=halo).padded(pads, fill)
    assert recipe
    return Deferred(recipe), [*pads[4], *pads[3]]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolution.convolution(x, weight, bias, (1, 1, 1), (0, 0, 0), (1, 1, 1))


@SIDES
@DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inside_is_computed_while_the_halo_is_under_way(
    dtype: torch.dtype, dim: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator runs before anybody waits; the result is that of all rows together."""
    monkeypatch.setattr(convolution, "working_dtype", lambda dtype: torch.float32)
    events: list[str] = []
    run = convolution._run
    monkeypatch.setattr(convolution, "_run", lambda *args: (events.append("run"), run(*args))[1])
    whole, weight = draw(1, 4, 2, 12, 9, dtype=dtype), draw(6, 4, 2, 3, 3, dtype=dtype, seed=1)
    rest = whole.shape[dim] - 1
    parts = whole.split([1, rest] if side == "before" else [rest, 1], dim)
    edge, inside = parts if side == "before" else parts[::-1]
    x, pads = beside(side, dim, inside, edge, 1, Fill(), lambda: events.append("wait"))
    with torch.no_grad():
        found = convolve(x, weight, None)
        expected = F.conv3d(F.pad(whole, pads).double(), weight.double())
    # bfloat16 results are rounded once, to 8 bits; sums of 72 products in float32 lose less than 1e-6.
    assert_same(found.double(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert events[0] == "run"
    assert "wait" in events


@SIDES
@DIMS
@pytest.mark.parametrize("mode", ["constant", "replicate"])
@pytest.mark.parametrize("padding", [1, 40])
def test_padding_across_from_a_halo(padding: int, dim: int, side: str, mode: str) -> None:
    """Also so much of it that a piece of the result could see nothing else."""
    inside = draw(1, 4, 5, 12, 9)
    edge = draw(1, 4, 5, 1, 9) if dim == 3 else draw(1, 4, 5, 12, 1)
    weight, bias = draw(6, 4, 3, 3, 3, seed=1), draw(6, seed=2)
    x, pads = beside(side, dim, inside, edge, padding, Fill(mode))
    with torch.no_grad():
        found = convolve(x, weight, bias)
        whole = torch.cat([edge, inside] if side == "before" else [inside, edge], dim)
        assert_same(found, F.conv3d(F.pad(whole, [*pads, 0, 0], mode=mode), weight, bias), 1e-13)


def test_borders_are_no_pieces_of_their_own() -> None:
    """Each is part of one of several equal pieces, after those that need no halo."""
    assert line(33, (1, 33)).in_order(1000) == [(17, 33), (0, 17)]
    assert line(128, (1, 127)).in_order(42) == [(32, 64), (64, 96), (0, 32), (96, 128)]
    assert line(128, (0, 128)).in_order(64) == [(0, 64), (64, 128)]


def line(size: int, inner: tuple[int, int]) -> Line:
    return Line(3, size, 1, 2, inner)
