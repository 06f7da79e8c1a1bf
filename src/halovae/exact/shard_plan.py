"""Which shards to cut: decided from sizes alone, the same on every rank, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from halovae.base.errors import InputError
from halovae.base.geometry import MIN_ROWS, even_bounds
from halovae.base.options import Axis

BOTH_WAYS = 1.25
"""What a shard costs where both axes are cut, over one of its size where one is: the halo of the first axis has to come
before that of the second is sent, for the corners, and nothing is computed meanwhile. Measured when the second one was
waited for as well: docs/internals/performance-log.md, under "More ranks than two" and "GPUs"."""
BORDER = 0.25
"""What a position along an inner border costs, over one inside: it is moved and not computed. An estimate."""


@dataclass(frozen=True)
class ShardPlan:
    """A grid of shards and where it cuts the input."""

    shape: tuple[int, int]
    """Rows and columns of shards; their product is the number of ranks at work."""
    bounds: tuple[tuple[int, ...], tuple[int, ...]]
    """Cuts of the input's height and width: (0, ..., height) and (0, ..., width)."""

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns of the largest shard."""
        rows, cols = (max(high - low for low, high in pairwise(bounds)) for bounds in self.bounds)
        return rows, cols


def plan_shards(height: int, width: int, ratio: int, ranks: int, axis: Axis = "auto") -> ShardPlan:
    """Cut an input of `height` x `width` for up to `ranks` ranks.

    Args:
        height: rows of the input (pixels for encode, latents for decode).
        width: columns of the input.
        ratio: input rows per latent row: the spatial compression for encode, 1 for decode. Cuts fall on multiples.
        ranks: ranks that may work.
        axis: "height", "width", (rows, columns), or "auto": the smallest largest shard with the
            least border, both axes only where that makes it a good deal smaller.

    Returns:
        A plan for `ranks` ranks or, where the input is too small, for fewer.

    Raises:
        InputError: the input is smaller than one latent row or column.
    """
    rows, cols = height // ratio, width // ratio
    if rows < 1 or cols < 1:
        raise InputError(f"the input is {height} x {width}, smaller than one latent position: use at least {ratio}")
    most_rows, most_cols = max(1, rows // MIN_ROWS), max(1, cols // MIN_ROWS)
    if axis == "height":
        shape = (min(ranks, most_rows), 1)
    elif axis == "width":
        shape = (1, min(ranks, most_cols))
    elif axis == "auto":
        shape = _best_shape(rows, cols, ranks, most_rows, most_cols)
    else:
        assert not isinstance(axis, str)
        shape = (min(axis[0], most_rows), min(axis[1], most_cols))
    bounds = even_bounds(rows, shape[0], ratio, height), even_bounds(cols, shape[1], ratio, width)
    return ShardPlan(shape, bounds)


def _best_shape(rows: int, cols: int, ranks: int, most_rows: int, most_cols: int) -> tuple[int, int]:
    candidates = [
        (down, across)
        for down in range(1, min(ranks, most_rows) + 1)
        for across in range(1, min(ranks // down, most_cols) + 1)
    ]
    return min(candidates, key=lambda shape: (_cost(rows, cols, shape), shape[0] * shape[1], shape))


def _cost(rows: int, cols: int, shape: tuple[int, int]) -> float:
    """What the largest shard costs, in positions."""
    down, across = shape
    tall, wide = -(-rows // down), -(-cols // across)
    border = wide * min(down - 1, 2) + tall * min(across - 1, 2)
    return tall * wide * (BOTH_WAYS if down > 1 and across > 1 else 1) + BORDER * border
