"""Seam energy at given lines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from halovae.evaluation import CutLines, compare_clips, near_lines, seam_energy

SIZE = (96, 160)


class TestSeamEnergy:
    def test_even_difference(self) -> None:
        assert seam_energy(np.ones(SIZE), CutLines(rows=(48,))) == 1

    def test_at_the_lines(self) -> None:
        energy = np.ones(SIZE)
        energy[40:56] = 3
        assert seam_energy(energy, CutLines(rows=(48,))) == 3
        assert seam_energy(energy, CutLines(columns=(80,))) == pytest.approx(1)

    def test_overlap_counts_as_near(self) -> None:
        energy = np.ones(SIZE)
        energy[:, 80:112] = 3
        assert seam_energy(energy, CutLines(columns=(80,), overlap=(0, 32)), reach=0) == 3

    def test_only_at_the_lines(self) -> None:
        energy = np.zeros(SIZE)
        energy[47] = 1
        assert seam_energy(energy, CutLines(rows=(48,))) == math.inf

    @pytest.mark.parametrize(
        ("energy", "grid"),
        [(np.ones(SIZE), CutLines()), (np.zeros(SIZE), CutLines(rows=(48,))), (np.ones((8, 8)), CutLines(rows=(4,)))],
        ids=["no line", "no difference", "all near"],
    )
    def test_nothing_to_say(self, energy: NDArray[Any], grid: CutLines) -> None:
        assert seam_energy(energy, grid) is None

    @given(st.sets(st.integers(1, 59)), st.sets(st.integers(1, 89)), st.integers(1, 9), st.integers(0, 9))
    def test_near_is_what_it_says(self, rows: set[int], columns: set[int], reach: int, overlap: int) -> None:
        near = near_lines((60, 90), CutLines(rows=tuple(rows), columns=tuple(columns), overlap=(overlap, 0)), reach)
        for y, x in [(0, 0), (17, 40), (59, 89), (30, 5)]:
            expected = any(r - reach <= y < r + overlap + reach for r in rows)
            expected |= any(c - reach <= x < c + reach for c in columns)
            assert near[y, x] == expected

    @given(st.lists(st.integers(-5, 200)))
    def test_only_lines_inside_stay(self, lines: list[int]) -> None:
        inside = CutLines(rows=tuple(lines)).inside(SIZE).rows
        assert set(inside) == {line for line in lines if 0 < line < SIZE[0]}
        assert list(inside) == sorted(inside)


def test_only_given_lines_are_looked_at() -> None:
    gap = np.random.default_rng(0).normal(0, 2, (3, *SIZE, 3))
    gap[:, 40:56] *= 2
    grey = np.full((3, *SIZE, 3), 128.0)
    found = compare_clips(grey, grey + gap, CutLines(rows=(0, 48, 96), columns=(300,)))
    assert found.grid == CutLines(rows=(48,))
    assert found.seam == pytest.approx(4, abs=0.5)
    assert compare_clips(grey, grey + gap).seam is None
