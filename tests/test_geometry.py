"""The integer arithmetic of cuts, against brute force over single positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halovae.base.errors import InputError
from halovae.base.geometry import (
    Cut,
    coarsen,
    covering,
    cut_at,
    divides,
    even_bounds,
    missing,
    narrowest,
    overlap,
    padded,
    refine,
    transposed_window,
    window,
)


@st.composite
def cuts(draw: st.DrawFn, least: int = 1, most: int = 9) -> Cut:
    """A cut of one to four parts."""
    sizes = draw(st.lists(st.integers(least, most), min_size=1, max_size=4))
    return cut_at(tuple(sum(sizes[:i]) for i in range(len(sizes) + 1)))


@st.composite
def cuts_with_halo(draw: st.DrawFn) -> Cut:
    cut = draw(cuts())
    extents = [
        (max(0, low - draw(st.integers(0, 2))), min(cut.size, high + draw(st.integers(0, 2))))
        for low, high in cut.extents
    ]
    return Cut(cut.bounds, tuple(extents))


extents = st.tuples(st.integers(-5, 12), st.integers(0, 9)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def owners(cut: Cut) -> list[int]:
    """Which part owns each position."""
    return [part for part in range(cut.parts) for _ in range(*cut.owned(part))]


@given(cuts())
def test_parts_own_every_position_once(cut: Cut) -> None:
    assert len(owners(cut)) == cut.size
    assert owners(cut) == sorted(owners(cut))
    assert not cut.has_halo
    assert [cut.present(part) for part in range(cut.parts)] == [owners(cut).count(part) for part in range(cut.parts)]
    assert narrowest(cut) == min(map(cut.present, range(cut.parts)))


@given(cuts_with_halo(), st.integers(1, 4))
def test_refining_repeats_every_position_and_coarsening_undoes_it(cut: Cut, factor: int) -> None:
    fine = refine(cut, factor)
    assert owners(fine) == [owner for owner in owners(cut) for _ in range(factor)]
    assert fine.has_halo == cut.has_halo
    assert divides(fine, factor)
    assert coarsen(fine, factor) == cut


@given(cuts_with_halo(), st.integers(1, 5))
def test_divides_says_whether_coarsening_loses_positions(cut: Cut, factor: int) -> None:
    assert divides(cut, factor) == (refine(coarsen(cut, factor), factor) == cut)


def reads(position: int, kernel: int, stride: int, padding: int, dilation: int) -> set[int]:
    start = position * stride - padding
    return {start + dilation * tap for tap in range(kernel)}


@given(cuts(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_a_window_needs_all_that_its_outputs_read(
    cut: Cut, kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> None:
    padding = min(padding, kernel // 2)
    reach = dilation * (kernel - 1)
    if cut.size + 2 * padding < reach + 1:
        with pytest.raises(InputError, match="smaller than a window"):
            window(cut, kernel, stride, padding, dilation, ceil)
        return
    found = window(cut, kernel, stride, padding, dilation, ceil)
    count = 0
    while True:  # torch: a window fits, or (ceil) begins before the padding behind the axis does
        start = count * stride - padding
        fits = start + reach < cut.size + padding
        if not fits and not (ceil and start < cut.size and (start - stride) + reach + 1 < cut.size + padding):
            break
        count += 1
    assert found.out.size == count
    for part, (low, high) in enumerate(found.out.extents):
        for position in range(low, high):
            inside = {p for p in reads(position, kernel, stride, padding, dilation) if p < cut.size + padding}
            assert inside <= set(range(*found.needs[part]))
        if low < high:
            first = reads(low, kernel, stride, padding, dilation)
            assert found.needs[part][0] == min(first), "more than the first output reads"


@given(cuts(), st.sampled_from([1, 3, 5]), st.integers(1, 2))
def test_a_same_window_keeps_the_cut(cut: Cut, kernel: int, dilation: int) -> None:
    assert window(cut, kernel, 1, dilation * (kernel - 1) // 2, dilation).out == cut


@given(cuts(), st.integers(1, 4))
def test_a_window_without_overlap_divides_a_cut_on_its_multiples(cut: Cut, stride: int) -> None:
    found = window(refine(cut, stride), stride, stride, 0, 1)
    assert found.out == cut
    assert found.needs == refine(cut, stride).extents


@given(cuts(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.integers(0, 1))
def test_a_transposed_window_needs_all_inputs_that_write_its_outputs(
    cut: Cut, kernel: int, stride: int, padding: int, dilation: int, extra: int
) -> None:
    out_size = (cut.size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + min(extra, stride - 1)
    if out_size < 1:
        return
    found = transposed_window(cut, kernel, stride, padding, dilation, min(extra, stride - 1))
    assert found.out.size == out_size
    assert len(owners(found.out)) == out_size
    for source in range(cut.size):
        for tap in range(kernel):
            target = source * stride - padding + dilation * tap
            if 0 <= target < out_size:
                low, high = found.needs[owners(found.out)[target]]
                assert low <= source < high


@given(cuts(), st.integers(0, 3), st.integers(0, 3))
def test_padding_grows_the_outer_parts_and_fetches_what_a_window_behind_it_reads(
    cut: Cut, before: int, after: int
) -> None:
    found = padded(cut, before, after)
    assert found.out.size == cut.size + before + after
    for part, (low, high) in enumerate(found.needs):
        assert found.out.extents[part] == (low + before, high + before)
        assert set(range(*cut.owned(part))) <= set(range(low, high))
    kernel = before + after + 1
    assert window(found.out, kernel, 1, 0, 1).out.size == cut.size
    for part in range(cut.parts):  # a same-sized output reads only what is there
        low, high = cut.owned(part)
        assert set(range(low, high - 1 + kernel)) <= set(range(*found.out.extents[part]))


@given(extents, extents)
def test_overlap_is_the_intersection(a: tuple[int, int], b: tuple[int, int]) -> None:
    common = sorted(set(range(*a)) & set(range(*b)))
    assert overlap(a, b) == ((common[0], common[-1] + 1) if common else None)


@given(st.integers(0, 9), st.integers(1, 6), extents)
def test_missing_is_the_difference_within_the_axis(start: int, length: int, need: tuple[int, int]) -> None:
    have, size = (start, start + length), 12
    found = [position for piece in missing(have, need, size) for position in range(*piece)]
    assert found == sorted((set(range(*need)) & set(range(size))) - set(range(*have)))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 8), st.integers(0, 7))
def test_even_bounds_differ_by_one_latent_at_most(size: int, parts: int, ratio: int, rest: int) -> None:
    size = max(size, parts)
    bounds = even_bounds(size, parts, ratio, size * ratio + min(rest, ratio - 1))
    latents = [b // ratio - a // ratio for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert sum(latents) == size
    assert max(latents) - min(latents) <= 1
    assert all(b % ratio == 0 for b in bounds[:-1])
    assert bounds[-1] == size * ratio + min(rest, ratio - 1)


@given(cuts_with_halo(), st.data())
def test_covering_holds_the_rows_that_others_need(cut: Cut, data: st.DataObject) -> None:
    needs = tuple(data.draw(extents) for _ in range(cut.parts))
    covered = covering(cut, needs)
    for part, (low, high) in enumerate(covered):
        assert low <= needs[part][0]
        assert needs[part][1] <= high
        for other in range(cut.parts):
            if other != part:
                asked = {row for piece in missing(cut.extents[other], needs[other], cut.size) for row in range(*piece)}
                assert asked & set(range(*cut.owned(part))) <= set(range(low, high))
