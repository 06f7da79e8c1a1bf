"""Seams: whether the difference gathers along the lines at which a picture was cut.

A line at n lies between the rows (or columns) n - 1 and n. Where tiles overlap, the next tile begins at the line and
the one before ends `overlap` further on; between the two they are blended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float64]
"""(height, width) of one non-negative number per position."""

REACH = 8
"""Rows and columns on each side of a line that count as near it."""


@dataclass(frozen=True, kw_only=True)
class CutLines:
    """Where a picture was cut."""

    rows: tuple[int, ...] = ()
    """Lines between rows."""
    columns: tuple[int, ...] = ()
    """Lines between columns."""
    overlap: tuple[int, int] = (0, 0)
    """Rows and columns that neighbouring tiles share."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns)

    @classmethod
    def every(cls, step: tuple[int, int], size: tuple[int, int], overlap: tuple[int, int] = (0, 0)) -> CutLines:
        """A line after each `step` rows and columns of a picture of `size`; a step of 0 gives none."""
        rows, columns = (tuple(range(s, most, s)) if s else () for s, most in zip(step, size, strict=True))
        return cls(rows=rows, columns=columns, overlap=overlap)

    def inside(self, size: tuple[int, int]) -> CutLines:
        """The lines that lie inside a picture of `size`; bounds of an axis hold its two ends too."""
        rows, columns = (
            tuple(sorted({n for n in lines if 0 < n < most}))
            for lines, most in zip((self.rows, self.columns), size, strict=True)
        )
        return CutLines(rows=rows, columns=columns, overlap=self.overlap)

    def to_dict(self) -> dict[str, list[int]]:
        return {name: list(value) for name, value in vars(self).items()}


def near_lines(size: tuple[int, int], grid: CutLines, reach: int = REACH) -> NDArray[np.bool_]:
    """Which positions of a picture of `size` (height, width) lie within `reach` of a line or where tiles overlap."""
    near = np.zeros(size, dtype=np.bool_)
    for line in grid.rows:
        near[max(0, line - reach) : line + grid.overlap[0] + reach] = True
    for line in grid.columns:
        near[:, max(0, line - reach) : line + grid.overlap[1] + reach] = True
    return near


def seam_energy(energy: NDArray[Any], grid: CutLines, reach: int = REACH) -> float | None:
    """Mean energy near the lines over mean energy elsewhere: 1 where the lines make no difference.

    Args:
        energy: (height, width), squared difference per position.

    Returns:
        The ratio, infinite if there is a difference near the lines only; None if there is no difference, no line, or
        nothing but lines.
    """
    near = near_lines((energy.shape[0], energy.shape[1]), grid, reach)
    if near.all() or not near.any() or not energy.any():
        return None
    elsewhere = float(energy[~near].mean())
    return float(energy[near].mean()) / elsewhere if elsewhere else math.inf
