"""Views of cut tensors, against brute force: label every position, cut, view locally, compare with the whole's view."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import Cut, cut_at
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    Factor,
    Layout,
    global_length,
    layout_of,
    mark,
    merge_factors,
    permuted,
    plain,
    reshaped,
    split_factor,
)
from halovae.exact.rules.elementwise import broadcast

ROWS, COLS = cut_at((0, 4, 8, 16)), cut_at((0, 4, 12))
"""Uneven cuts of a height of 16 and a width of 12."""


def axis(number: int, cut: Cut, part: int) -> Dim:
    return (AxisFactor(cut.present(part), number, cut),)


def grid(part: tuple[int, int]) -> Layout:
    """[batch 2, channels 6, height, width] on one rank."""
    return Layout((plain(2), plain(6), axis(0, ROWS, part[0]), axis(1, COLS, part[1])))


def local(whole: Tensor, layout: Layout, part: tuple[int, int]) -> Tensor:
    """The positions of a whole tensor that a rank with this layout has, factor by factor."""
    factors = [factor for dim in layout.dims for factor in dim]
    whole = whole.reshape([global_length((factor,)) for factor in factors])
    for place, factor in enumerate(factors):
        if isinstance(factor, AxisFactor):
            low, high = factor.cut.owned(part[factor.axis])
            whole = whole.narrow(place, low, high - low)
    return whole.reshape(layout.shape)


PARTS = list(itertools.product(range(ROWS.parts), range(COLS.parts)))
LABELS = torch.arange(2 * 6 * 16 * 12).reshape(2, 6, 16, 12)


VIEWS: dict[str, list[Any]] = {
    "flatten the picture": [lambda h, w: (2, 6, h * w)],
    "rows as batch": [lambda h, w: (2, 6 * h, w)],
    "batch and rows": [(0, 2, 1, 3), lambda h, w: (2 * h, 6, w)],
    "pixels as batch": [(0, 2, 3, 1), lambda h, w: (2 * h * w, 6)],
    "and back": [(0, 2, 3, 1), lambda h, w: (2 * h * w, 6), lambda h, w: (2, h, w, 6), (0, 3, 1, 2)],
    "patches": [lambda h, w: (2, 6, h // 2, 2, w // 2, 2), (0, 1, 3, 5, 2, 4), lambda h, w: (2, 24, h // 2, w // 2)],
    "unpatch": [lambda h, w: (2, 3, 2, h, w), (0, 1, 3, 2, 4), lambda h, w: (2, 3, h * 2, w)],
    "tokens": [(0, 2, 3, 1), lambda h, w: (2, h * w, 6), lambda h, w: (2, h * w, 3, 2), (0, 2, 1, 3)],
    "new dims": [lambda h, w: (2, 1, 6, h, 1, w), lambda h, w: (2, 6, h, w, 1)],
    "columns first": [(0, 1, 3, 2), lambda h, w: (2, 6, w * h), lambda h, w: (12, w, h)],
    "plain dims regrouped": [lambda h, w: (4, 3, h, w), lambda h, w: (12, h, w), lambda h, w: (3, 4, h, w)],
}


@pytest.mark.parametrize("steps", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_a_shard_are_shards_of_the_view(steps: list[Any]) -> None:
    for part in PARTS:
        whole, layout = LABELS, grid(part)
        shard = local(whole, layout, part)
        for step in steps:
            if callable(step):
                layout = reshaped(layout, step(16, 12))
                shard, whole = shard.reshape(layout.shape), whole.reshape(step(16, 12))
            else:
                layout, shard, whole = permuted(layout, step), shard.permute(step), whole.permute(step)
            assert tuple(map(global_length, layout.dims)) == tuple(whole.shape)
            assert torch.equal(shard, local(whole, layout, part))


def test_a_view_that_groups_more_rows_than_a_bound_allows_is_refused() -> None:
    with pytest.raises(NotExactError, match="does not divide the shards"):
        reshaped(Layout((axis(0, cut_at((0, 4, 12)), 1),)), (4, 3))


def test_a_split_that_leaves_a_rest_is_refused() -> None:
    with pytest.raises(NotExactError, match="splits 6 positions into 4"):
        split_factor(Factor(6), 4)


@given(st.lists(st.sampled_from([1, 2, 3, "axis"]), min_size=1, max_size=5), st.integers(0, 2))
def test_merging_factors_keeps_every_position(sizes: list[Any], part: int) -> None:
    """At most one axis; the merged dimension labels positions as the separate ones do."""
    seen, factors = False, []
    for size in sizes:
        if size == "axis" and not seen:
            factors.append(AxisFactor(ROWS.present(part), 0, ROWS))
        else:
            factors.append(Factor(2 if size == "axis" else size))
        seen = seen or size == "axis"
    before = Layout(tuple((factor,) for factor in factors))
    after = Layout((merge_factors(factors),))
    whole = torch.arange(global_length(after.dims[0]))
    separate = whole.reshape([global_length(dim) for dim in before.dims])
    assert torch.equal(local(whole, after, (part, 0)), local(separate, before, (part, 0)).reshape(-1))


def test_views_without_elements_keep_what_is_sharded() -> None:
    layout = Layout((plain(2), plain(6), plain(0), axis(0, ROWS, 1), axis(1, COLS, 0)))
    for shape in (
        (2, 6, 0, 2, 8, 2, 6, 2),
        (2, 2, 3, 0, 5, 16, 12),
        (12, 0, 16, 12),
        (2, 6, 0, 192),
        (7, 0, 0, 16, 12),
    ):
        viewed = reshaped(layout, shape)
        assert viewed.whole == shape
        assert viewed.cuts != []
        assert reshaped(viewed, layout.whole).whole == layout.whole
    assert reshaped(layout, (2, 0)).whole == (2, 0)
    with pytest.raises(NotExactError, match="has no elements"):
        reshaped(layout, (2, 0, 0))


def test_broadcast_takes_the_sharded_dim_and_refuses_one_that_knows_nothing() -> None:
    layout = grid((0, 0))
    assert broadcast([(layout, layout.shape), (None, (6, 1, 1))], layout.shape) == layout
    with pytest.raises(NotExactError, match="knows nothing of the shards"):
        broadcast([(layout, layout.shape), (None, layout.shape)], layout.shape)
    halo = Cut(ROWS.bounds, ((0, 5), (3, 9), (7, 16)))
    with pytest.raises(NotExactError, match="cut differently"):
        broadcast([(layout, layout.shape), (layout.replace(2, axis(0, halo, 0)), (2, 6, 5, 4))], layout.shape)


def test_mark_checks_the_shape() -> None:
    with pytest.raises(NotExactError, match="shape"):
        mark(torch.zeros(2, 6, 4, 3), grid((0, 0)))


def test_mark_refuses_an_axis_that_meets_itself() -> None:
    with pytest.raises(NotExactError, match="has a part only"):
        mark(torch.zeros(4, 4), Layout((axis(0, ROWS, 0), axis(0, ROWS, 0))))


def test_mark_refuses_shards_of_one_row() -> None:
    cut = cut_at((0, 1, 5))
    with pytest.raises(NotExactError, match="fewer than 2 rows"):
        mark(torch.zeros(4), Layout((axis(0, cut, 1),)))


def test_marking_without_sharded_dims_takes_the_layout_away() -> None:
    tensor = mark(torch.zeros(2, 6, 4, 4), grid((0, 0)))
    assert layout_of(tensor) == grid((0, 0))
    assert layout_of(mark(tensor, None)) is None
    assert layout_of(mark(tensor, Layout((plain(2), plain(6), plain(4), plain(4))))) is None
