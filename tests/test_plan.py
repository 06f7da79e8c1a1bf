"""Where the input is cut, against brute force over every grid."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halovae.base.errors import InputError
from halovae.base.geometry import MIN_ROWS
from halovae.exact.mesh import ShardPlan, plan_shards

sizes = st.integers(1, 40)


def shards(plan: ShardPlan) -> list[tuple[int, int]]:
    """(rows, columns) of every shard."""
    rows, cols = ([high - low for low, high in itertools.pairwise(bounds)] for bounds in plan.bounds)
    return list(itertools.product(rows, cols))


def longest_border(plan: ShardPlan) -> int:
    """Positions along inner borders of the shard that has most of them."""
    down, across = plan.shape
    tall, wide = max(rows for rows, _ in shards(plan)), max(cols for _, cols in shards(plan))
    return wide * min(down - 1, 2) + tall * min(across - 1, 2)


@given(sizes, sizes, st.integers(1, 9))
def test_auto_takes_the_least_cost(rows: int, cols: int, ranks: int) -> None:
    found = plan_shards(rows, cols, 1, ranks, "auto")
    grids = [
        plan_shards(rows, cols, 1, ranks, (down, across))
        for down in range(1, ranks + 1)
        for across in range(1, ranks // down + 1)
    ]

    def cost(plan: ShardPlan) -> tuple[float, int]:
        """Of the largest shard, a quarter more where both axes are cut; a position at a border costs a quarter."""
        largest = max(a * b for a, b in shards(plan)) * (1.25 if min(plan.shape) > 1 else 1)
        return largest + longest_border(plan) / 4, plan.shape[0] * plan.shape[1]

    assert cost(found) == min(map(cost, grids))


@given(
    sizes, sizes, st.integers(1, 6), st.integers(1, 8), st.sampled_from(["auto", "height", "width", (2, 2), (1, 3)]),
    st.integers(0, 7), st.integers(0, 7),
)  # fmt: skip
def test_bounds_cover_the_input_on_multiples_of_the_ratio(
    rows: int, cols: int, ranks: int, ratio: int, axis: str | tuple[int, int], below: int, right: int
) -> None:
    height, width = rows * ratio + below % ratio, cols * ratio + right % ratio
    plan = plan_shards(height, width, ratio, ranks, axis)
    for bounds, size, parts in zip(plan.bounds, (height, width), plan.shape, strict=True):
        assert (bounds[0], bounds[-1], len(bounds)) == (0, size, parts + 1)
        assert all(bound % ratio == 0 for bound in bounds[:-1])
        if parts > 1:
            assert all(high // ratio - low // ratio >= MIN_ROWS for low, high in itertools.pairwise(bounds))
    assert isinstance(axis, tuple) or plan.shape[0] * plan.shape[1] <= ranks


@pytest.mark.parametrize(
    ("axis", "ranks", "shape"),
    [
        ("height", 4, (4, 1)), ("width", 4, (1, 4)), ("auto", 4, (1, 4)), ("auto", 1, (1, 1)),
        ("height", 9, (8, 1)), ("auto", 7, (1, 7)), ((2, 3), 6, (2, 3)), ((20, 1), 20, (8, 1)),
    ],
)  # fmt: skip
def test_grid(axis: str | tuple[int, int], ranks: int, shape: tuple[int, int]) -> None:
    """Of 16 x 28 latents."""
    assert plan_shards(16 * 8, 28 * 8, 8, ranks, axis).shape == shape


@pytest.mark.parametrize(("ranks", "shape"), [(2, (1, 2)), (4, (1, 4)), (8, (1, 8)), (64, (3, 21))])
def test_grid_of_a_usual_video(ranks: int, shape: tuple[int, int]) -> None:
    """Of 480 x 832 pixels: one axis, until its shards get thin."""
    assert plan_shards(480, 832, 8, ranks).shape == shape


@pytest.mark.parametrize(("height", "width"), [(7, 80), (80, 7), (0, 8)])
def test_less_than_one_latent_is_refused(height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"{height} x {width}.*at least 8"):
        plan_shards(height, width, 8, 2)
