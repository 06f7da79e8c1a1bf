"""A convolution beside a halo: which pieces of it are computed when, and that together they are all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shards import assert_same, draw
from torch import Tensor

from halovae.kernels import convolution
from halovae.kernels.borders import Fill
from halovae.kernels.deferred import Deferred
from halovae.kernels.joined import Halo, Joined

pytestmark = pytest.mark.usefixtures("small_pieces")
SIDES = pytest.mark.parametrize("side", ["before", "after"])


def beside(
    side: str, inside: Tensor, row: Tensor, rows: int, fill: Fill, wait: Callable[[], None] = lambda: None
) -> tuple[Tensor, tuple[int, int]]:
    """`inside` with `row` as its halo on one side and `rows` of padding on the other, and what was padded in rows."""
    first = side == "before"
    halo = Halo(3, *((row, None) if first else (None, row)), wait)
    pads = (0, rows) if first else (rows, 0)
    recipe = Joined((inside,), halo=halo).padded({3: pads, 4: (1, 1)}, fill)
    assert recipe
    return Deferred(recipe), pads


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolution.convolution(x, weight, bias, (1, 1, 1), (0, 0, 0), (1, 1, 1))


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inside_is_computed_while_the_halo_is_under_way(
    dtype: torch.dtype, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator runs before anybody waits; the result is that of all rows together."""
    monkeypatch.setattr(convolution, "working_dtype", lambda dtype: torch.float32)
    events: list[str] = []
    run = convolution._run
    monkeypatch.setattr(convolution, "_run", lambda *args: (events.append("run"), run(*args))[1])
    whole, weight = draw(1, 4, 2, 12, 9, dtype=dtype), draw(6, 4, 2, 3, 3, dtype=dtype, seed=1)
    inside, row = (
        (whole[..., 1:, :], whole[..., :1, :]) if side == "before" else (whole[..., :-1, :], whole[..., -1:, :])
    )
    x, pads = beside(side, inside, row, 1, Fill(), lambda: events.append("wait"))
    with torch.no_grad():
        found = convolve(x, weight, None)
        expected = F.conv3d(F.pad(whole, (1, 1, *pads)).double(), weight.double())
    # bfloat16 results are rounded once, to 8 bits; sums of 72 products in float32 lose less than 1e-6.
    assert_same(found.double(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert events[0] == "run"
    assert "wait" in events


@SIDES
@pytest.mark.parametrize("mode", ["constant", "replicate"])
@pytest.mark.parametrize("rows", [1, 40])
def test_padding_across_from_a_halo(rows: int, side: str, mode: str) -> None:
    """Also so many rows of it that a piece of the result could see nothing else."""
    inside, row = draw(1, 4, 5, 12, 9), draw(1, 4, 5, 1, 9)
    weight, bias = draw(6, 4, 3, 3, 3, seed=1), draw(6, seed=2)
    x, pads = beside(side, inside, row, rows, Fill(mode))
    with torch.no_grad():
        found = convolve(x, weight, bias)
        whole = torch.cat([row, inside] if side == "before" else [inside, row], 3)
        assert_same(found, F.conv3d(F.pad(whole, (1, 1, *pads, 0, 0), mode=mode), weight, bias), 1e-13)


def test_borders_are_no_pieces_of_their_own() -> None:
    """Each is part of one of several equal pieces, after those that need no halo."""
    assert convolution._in_order(1, 33, 33, 1000) == [(18, 33), (0, 18)]
    assert convolution._in_order(1, 127, 128, 42) == [(32, 64), (64, 96), (0, 32), (96, 128)]
    assert convolution._in_order(0, 128, 128, 64) == [(0, 64), (64, 128)]
