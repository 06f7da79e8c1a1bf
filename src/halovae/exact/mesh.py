"""Where this rank stands in the rows x cols grid of shards, and who its peers are."""

from __future__ import annotations

import torch

from halovae.base.errors import HalovaeError
from halovae.comm import Comm
from halovae.exact.layout import Layout


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
