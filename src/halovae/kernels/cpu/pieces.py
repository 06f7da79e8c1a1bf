"""Which rows or columns of a convolution are computed when: those that need no halo first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halovae.base.geometry import Extent
from halovae.kernels.lazy.joined import Joined

WINDOW_BYTES = 1 << 23
"""Bytes of a piece of a convolution's input, per thread: small beside the picture, large beside the rows it shares."""

MANY = 16
"""With fewer inner rows or columns than that, nothing is computed while the halo is under way."""


@dataclass(frozen=True)
class Line:
    """A convolution along the dimension in which it is cut into pieces. Positions are the result's."""

    dim: int
    size: int
    stride: int
    reach: int
    """Positions of the input that a position needs beyond its first one."""
    inner: Extent
    """Positions that need nothing of the halo."""

    @property
    def has_many_inside(self) -> bool:
        return self.inner[1] - self.inner[0] >= MANY

    @property
    def borders(self) -> list[Extent]:
        """Positions that need the halo."""
        sides = (0, self.inner[0]), (self.inner[1], self.size)
        return [(low, high) for low, high in sides if low < high]

    def source(self, span: Extent) -> Extent:
        """What positions need of the padded input."""
        return span[0] * self.stride, (span[1] - 1) * self.stride + self.reach + 1

    def is_inside(self, span: Extent) -> bool:
        return self.inner[0] <= span[0] and span[1] <= self.inner[1]

    def in_order(self, step: int) -> list[Extent]:
        """Pieces of `step` positions, or one more, at the most; those inside first, if these are many."""
        if self.borders and self.has_many_inside:
            # Equal ones, as one of the border alone would cost more than its share.
            step = -(-self.size // max(1 + len(self.borders), -(-self.size // step)))
        spans = [(at, min(at + step, self.size)) for at in range(0, self.size, step)]
        return sorted(spans, key=lambda span: not self.is_inside(span))


def line_of(joined: Joined, shape: Sequence[int], stride: Sequence[int], reach: Sequence[int]) -> Line:
    """Along the halo if much can be computed without it, else along the height."""
    height = len(shape) - 2
    dims = [height] if joined.halo is None or joined.halo.dim == height else [joined.halo.dim, height]
    lines = [_along(joined, dim, shape[dim], stride[dim - 2], reach[dim - 2]) for dim in dims]
    return next((line for line in lines if line.has_many_inside), lines[-1])


def _along(joined: Joined, dim: int, size: int, stride: int, reach: int) -> Line:
    if (halo := joined.halo) is None:
        return Line(dim, size, stride, reach, (0, size))
    if halo.dim != dim:  # Every row ends in it.
        return Line(dim, size, stride, reach, (0, 0))
    (before, after), (lead, trail) = halo.lengths, joined.pads.get(dim, (0, 0))
    low = -(-(lead + before) // stride) if before else 0
    end = joined.shape[dim] - trail - after
    high = (end - reach - 1) // stride + 1 if after else size
    return Line(dim, size, stride, reach, (low, max(low, high)))
