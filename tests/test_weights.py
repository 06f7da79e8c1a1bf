"""What the kernels make of weights: anew when they change, for each shape, and not too much of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shards import assert_same, draw
from torch import Tensor

from halovae.kernels import packed
from halovae.kernels.mode import FastMode


@pytest.mark.parametrize("change", ["in place", "behind torch's back", "replaced"])
def test_a_changed_weight_is_noticed(change: str) -> None:
    weight = torch.nn.Parameter(draw(6, 4, 3, 3, dtype=torch.float32), requires_grad=False)
    x = draw(2, 4, 12, 9, dtype=torch.float32)

    def both() -> tuple[Tensor, Tensor]:
        with FastMode():
            found = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1), F.conv2d(x, weight)
        return found[0], found[1]

    before = both()
    if change == "in place":
        weight.mul_(3)
    elif change == "behind torch's back":
        weight.data.mul_(3)
    else:
        weight.data = weight.data * 3
    for old, new in zip(before, both(), strict=True):
        assert_same(new, 3 * old, 1e-5)


def test_weights_are_packed_for_the_very_shape_and_few_are_kept() -> None:
    weight, made = draw(8, 4, 3, 3, dtype=torch.float32), []

    def prepared(rows: int) -> None:
        packed.prepared(weight, "kind", lambda: (made.append(rows), weight)[1], (1, 4, rows, 9), (1, 1), (0, 0), (1, 1))

    for rows in (5, 9, 5, 5, 9):
        prepared(rows)
    assert made == [5, 9]
    for rows in range(10, 20):
        prepared(rows)
    prepared(19)
    assert made == [5, 9, *range(10, 20)]
    prepared(5)
    assert made[-1] == 5
