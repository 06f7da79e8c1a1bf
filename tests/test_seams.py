"""Seam energy at given lines, and grids of tiles found where there are some and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from halovae.quality import Grid, compare_clips, near_lines, seam_energy

SIZE = (96, 160)


def rough(strength: float = 2.0, seed: int = 0) -> NDArray[np.float64]:
    """A difference that is the same everywhere: smooth noise, as a VAE's is."""
    noise = np.random.default_rng(seed).normal(0, 1, (3, *SIZE, 3))
    for axis in (1, 2):
        noise = sum(np.roll(noise, shift, axis) for shift in range(5)) / math.sqrt(5)
    return noise * strength


def tiled(stride: int, overlap: int, seed: int = 1) -> NDArray[Any]:
    """More difference where tiles meet."""
    gap = rough(0.5)
    near = near_lines(SIZE, Grid.every((stride, stride), SIZE, (overlap, overlap)), reach=1)
    gap[:, near] += 4 * np.random.default_rng(seed).normal(0, 1, (3, int(near.sum()), 3))
    return gap


GREY = np.full((3, *SIZE, 3), 128.0)


class TestSeamEnergy:
    def test_even_difference(self) -> None:
        assert seam_energy(np.ones(SIZE), Grid(rows=(48,))) == 1

    def test_at_the_lines(self) -> None:
        energy = np.ones(SIZE)
        energy[40:56] = 3
        assert seam_energy(energy, Grid(rows=(48,))) == 3
        assert seam_energy(energy, Grid(columns=(80,))) == pytest.approx(1)

    def test_overlap_counts_as_near(self) -> None:
        energy = np.ones(SIZE)
        energy[:, 80:112] = 3
        assert seam_energy(energy, Grid(columns=(80,), overlap=(0, 32)), reach=0) == 3

    def test_only_at_the_lines(self) -> None:
        energy = np.zeros(SIZE)
        energy[47] = 1
        assert seam_energy(energy, Grid(rows=(48,))) == math.inf

    @pytest.mark.parametrize(
        ("energy", "grid"),
        [(np.ones(SIZE), Grid()), (np.zeros(SIZE), Grid(rows=(48,))), (np.ones((8, 8)), Grid(rows=(4,)))],
        ids=["no line", "no difference", "all near"],
    )
    def test_nothing_to_say(self, energy: NDArray[Any], grid: Grid) -> None:
        assert seam_energy(energy, grid) is None

    @given(st.sets(st.integers(1, 59)), st.sets(st.integers(1, 89)), st.integers(1, 9), st.integers(0, 9))
    def test_near_is_what_it_says(self, rows: set[int], columns: set[int], reach: int, overlap: int) -> None:
        near = near_lines((60, 90), Grid(rows=tuple(rows), columns=tuple(columns), overlap=(overlap, 0)), reach)
        for y, x in [(0, 0), (17, 40), (59, 89), (30, 5)]:
            expected = any(r - reach <= y < r + overlap + reach for r in rows)
            expected |= any(c - reach <= x < c + reach for c in columns)
            assert near[y, x] == expected

    @given(st.lists(st.integers(-5, 200)))
    def test_only_lines_inside_stay(self, lines: list[int]) -> None:
        inside = Grid(rows=tuple(lines)).inside(SIZE).rows
        assert set(inside) == {line for line in lines if 0 < line < SIZE[0]}
        assert list(inside) == sorted(inside)


class TestDetection:
    @pytest.mark.parametrize(("stride", "overlap"), [(32, 0), (40, 16), (24, 8)])
    def test_a_grid_is_found(self, stride: int, overlap: int) -> None:
        found = compare_clips(GREY, GREY + tiled(stride, overlap))
        assert found.detected
        assert found.grid.rows == tuple(range(stride, SIZE[0], stride))
        assert found.grid.columns == tuple(range(stride, SIZE[1], stride))
        assert found.seam is not None
        assert found.seam > 2

    @settings(max_examples=5, deadline=None)
    @given(st.integers(0, 1000))
    def test_none_in_an_even_difference(self, seed: int) -> None:
        found = compare_clips(GREY, GREY + rough(seed=seed))
        assert not found.grid
        assert found.seam is None

    def test_an_edge_of_the_picture_is_no_grid(self) -> None:
        """Four times the usual jump across one line, which two tiles could give, but so does a letterbox."""
        gap = rough()
        gap[:, :, 70:] += 2 * np.abs(np.diff(gap, axis=2)).mean()
        assert not compare_clips(GREY, GREY + gap).grid.columns

    def test_given_lines_are_taken(self) -> None:
        found = compare_clips(GREY, GREY + rough(), Grid(rows=(0, 48, 96), columns=(300,)))
        assert not found.detected
        assert found.grid == Grid(rows=(48,))
        assert found.seam == pytest.approx(1, abs=0.4)
