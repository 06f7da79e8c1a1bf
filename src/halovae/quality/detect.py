"""Find the grid of tiles that a difference shows, when nobody says where it is.

A tile's neighbours are unknown to the network, so its borders differ from the un-tiled picture, and the difference
jumps from pixel to pixel there. Tiles repeat at one stride; what is at home in the picture doesn't.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halovae.quality.seams import Grid

_SMALLEST = 16
"""Strides below this are no tiles; 8 and 16 are the blocks of video codecs."""
_EDGE = 8
"""Positions at the borders of the picture that don't count: padding makes them different in any network."""
_STANDS_OUT = {False: 3.0, True: 10.0}
"""How many times the usual jump every band shows at least; more for a lone one (True), which an edge in the picture
could be too. Un-tiled results of the shipped clip stay under 2 and 6, its tiled ones are over 10."""


class Steps:
    """How much the difference jumps from one row, and one column, to the next, over all frames."""

    def __init__(self) -> None:
        self._rows: Any = 0.0
        self._columns: Any = 0.0

    def add(self, gap: NDArray[np.float32]) -> None:
        """Take in one frame's result - reference, (height, width, channels)."""
        self._rows = self._rows + np.square(np.diff(gap, axis=0)).mean(axis=2, dtype=np.float64)
        self._columns = self._columns + np.square(np.diff(gap, axis=1)).mean(axis=2, dtype=np.float64)

    def find(self) -> Grid:
        """The grid at which the difference jumps as it does nowhere else; an empty one where there is none."""
        # A seam runs across the whole picture, unlike an edge in it: the median along it tells.
        rows, columns = _find(np.median(self._rows, axis=1)), _find(np.median(self._columns, axis=0))
        return Grid(
            rows=() if rows is None else rows.lines,
            columns=() if columns is None else columns.lines,
            overlap=(0 if rows is None else rows.overlap, 0 if columns is None else columns.overlap),
        )


@dataclass(frozen=True)
class _Comb:
    """Lines along one axis."""

    stride: int
    overlap: int
    size: int

    @property
    def lines(self) -> tuple[int, ...]:
        return tuple(range(self.stride, self.size, self.stride))

    @property
    def bands(self) -> list[slice]:
        """The jumps that belong to each line: the one across it, or those where tiles overlap."""
        if not self.overlap:
            return [slice(line - 1, line) for line in self.lines]
        return [slice(line, line + self.overlap) for line in self.lines if line < self.size - _EDGE]


def _find(steps: NDArray[np.float64]) -> _Comb | None:
    """Try every stride and overlap; of those that stand out, the one that explains most."""
    size = len(steps) + 1
    # The logarithm of nothing is far below everything, not undefined.
    heights = np.log(np.maximum(steps, np.finfo(np.float64).tiny))
    best: tuple[float, _Comb] | None = None
    for stride in range(_SMALLEST, size - _SMALLEST + 1):
        for overlap in (0, *range(8, stride // 2 + 1, 8)) if stride % 4 == 0 else (0,):
            comb = _Comb(stride, overlap, size)
            score = _score(heights, comb)
            if score is not None and (best is None or score > best[0]):
                best = score, comb
    return None if best is None else best[1]


def _score(heights: NDArray[np.float64], comb: _Comb) -> float | None:
    """How well a comb separates large jumps from small ones (Otsu's criterion); None where a band doesn't stand out."""
    bands = comb.bands
    near = np.zeros(len(heights), dtype=np.bool_)
    for band in bands:
        near[band] = True
    away = ~near
    away[:_EDGE] = away[-_EDGE:] = False
    if not bands or not away.any():
        return None
    usual = float(np.median(heights[away]))
    if min(float(np.median(heights[band])) for band in bands) - usual < math.log(_STANDS_OUT[len(bands) == 1]):
        return None
    share = float(near.mean())
    return float(heights[near].mean() - heights[~near].mean()) * math.sqrt(share * (1 - share))
