"""How a picture is cut, where this rank stands in the grid of shards, and which rows go from whom to whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from halovae.base.errors import HalovaeError, InputError
from halovae.base.geometry import MIN_ROWS, Cut, Extent, even_bounds, missing, overlap
from halovae.base.options import Axis
from halovae.comm import Comm
from halovae.exact.layout import Layout, require_axis

BOTH_WAYS = 1.25
"""What a shard costs where both axes are cut, over one of its size where one is: the halo of the first axis has to come
before that of the second is sent, for the corners, and nothing is computed meanwhile. Measured when the second one was
waited for as well: docs/performance.md, under "More ranks than two" and "GPUs"."""
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


# ---- this rank in the grid ------------------------------------------------------------------------------------------


class Mesh:
    """The first rows * cols ranks of a group, in row-major order.

    Only for ranks inside the grid: a rank beyond it has no shard and no mesh.

    Attributes:
        comm: the group.
        shape: (rows, cols).
        coordinates: this rank's (row, column).
        place: stands for this mesh in what may outlive it.
        sizes: what a network is told about the tensors of a layout.
    """

    def __init__(self, comm: Comm, shape: tuple[int, int]) -> None:
        rows, cols = shape
        if comm.rank >= rows * cols:
            raise HalovaeError(f"rank {comm.rank} has no place in a mesh of {rows} x {cols}")
        self.comm, self.shape = comm, shape
        self.coordinates = divmod(comm.rank, cols)
        self.place = object()
        self.sizes: dict[Layout, torch.Size] = {}

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def part(self, axis: int) -> int:
        """This rank's position along a spatial axis."""
        return self.coordinates[axis]

    def peers(self, axis: int) -> list[int]:
        """Group ranks along `axis` at this rank's other coordinate, by position (this rank among them)."""
        row, col = self.coordinates
        rows, cols = self.shape
        return [r * cols + col for r in range(rows)] if axis == 0 else [row * cols + c for c in range(cols)]

    def ranks_along(self, axes: set[int]) -> list[int]:
        """Group ranks that differ from this one only along `axes`."""
        if len(axes) > 1:
            return list(range(self.size))
        return self.peers(next(iter(axes)))


# ---- which rows go where --------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """A message: rank of the peer, and the global positions that go to it or come from it."""

    peer: int
    rows: Extent


def transfers(mesh: Mesh, layout: Layout, dim: int, needs: tuple[Extent, ...]) -> tuple[list[Transfer], list[Transfer]]:
    """What this rank sends and what it receives, in the order in which all ranks post it."""
    if 0 in layout.shape:  # there is nothing to send, on any rank
        return [], []
    factor = require_axis(layout, dim)
    peers = mesh.peers(factor.axis)
    moves = _between_parts(factor.cut, mesh.part(factor.axis), needs)
    sends, receives = ([Transfer(peers[part], rows) for part, rows in one_way] for one_way in moves)
    return sends, receives


_Moves = list[tuple[int, Extent]]


@lru_cache(maxsize=4096)
def _between_parts(cut: Cut, me: int, needs: tuple[Extent, ...]) -> tuple[_Moves, _Moves]:
    """As (part, rows): what part `me` sends and receives."""
    sends: _Moves = []
    receives: _Moves = []
    for part in range(cut.parts):
        if part == me:
            continue
        for wants, owns, found in ((part, me, sends), (me, part, receives)):
            for piece in missing(cut.extents[wants], needs[wants], cut.size):
                rows = overlap(piece, cut.owned(owns))
                if rows:
                    found.append((part, rows))
    return sends, receives
