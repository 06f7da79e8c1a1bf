"""Integer arithmetic of cuts: who owns which rows, and which rows an operator needs from whom.

Everything here is computed from sizes alone and gives the same answer on every rank, so no rank ever has to ask
another one how large its shard is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from halovae.base.errors import InputError

Extent = tuple[int, int]
"""Half-open range of positions along one axis, in global coordinates of one resolution."""

MIN_ROWS = 2
"""Fewest latent rows (or columns) in a shard. A one-row dimension would be ambiguous when a VAE reshapes it, and
reflect padding needs a second row."""


@dataclass(frozen=True)
class Cut:
    """How one spatial axis is cut at one resolution.

    Part i owns the positions [bounds[i], bounds[i + 1]); `extents[i]` is what it has in memory, which may be more
    (a halo already fetched).
    """

    bounds: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def size(self) -> int:
        """Positions along the whole axis."""
        return self.bounds[-1]

    @property
    def parts(self) -> int:
        return len(self.extents)

    def owned(self, part: int) -> Extent:
        return self.bounds[part], self.bounds[part + 1]

    @property
    def has_halo(self) -> bool:
        return self.extents != _owned_extents(self.bounds)

    def present(self, part: int) -> int:
        """Positions part `part` has in memory."""
        low, high = self.extents[part]
        return high - low


def _owned_extents(bounds: tuple[int, ...]) -> tuple[Extent, ...]:
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


@lru_cache(maxsize=4096)
def cut_at(bounds: tuple[int, ...]) -> Cut:
    """The cut with these bounds and no halo."""
    return Cut(bounds, _owned_extents(bounds))


@lru_cache(maxsize=4096)
def refine(cut: Cut, factor: int) -> Cut:
    """The same cut where every position became `factor` positions."""
    extents = tuple((low * factor, high * factor) for low, high in cut.extents)
    return Cut(tuple(b * factor for b in cut.bounds), extents)


@lru_cache(maxsize=4096)
def coarsen(cut: Cut, factor: int) -> Cut:
    """The same cut where `factor` positions became one; every bound must divide."""
    extents = tuple((low // factor, high // factor) for low, high in cut.extents)
    return Cut(tuple(b // factor for b in cut.bounds), extents)


@lru_cache(maxsize=4096)
def narrowest(cut: Cut) -> int:
    """Positions that the smallest part owns."""
    return min(high - low for low, high in _owned_extents(cut.bounds))


def divides(cut: Cut, factor: int) -> bool:
    """Whether all bounds and extents of the cut are multiples of `factor`."""
    return all(b % factor == 0 for b in cut.bounds) and all(e % factor == 0 for pair in cut.extents for e in pair)


@dataclass(frozen=True)
class Window:
    """What a sliding-window operator does to a cut axis: the cut of its output, and the input each part needs.

    `needs` may reach below 0 or beyond the axis: that is the operator's own padding.
    """

    out: Cut
    needs: tuple[Extent, ...]


@lru_cache(maxsize=4096)
def window(cut: Cut, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool = False) -> Window:
    """Cut and needs of a convolution or pooling along one axis.

    Output position o reads inputs o * stride - padding + dilation * [0, kernel). It belongs to the part that owns
    the input under the window's centre, so that a "same" convolution keeps the cut and a strided one divides it.

    Raises:
        InputError: the axis is smaller than the window.
    """
    reach = dilation * (kernel - 1)
    span = cut.size + 2 * padding - reach - 1
    if span < 0:
        raise InputError(f"an axis of {cut.size} positions is smaller than a window of {reach + 1}: use a larger size")
    out_size = span // stride + 1
    if ceil_mode and span % stride and out_size * stride < cut.size + padding:
        out_size += 1  # a last window that begins inside the axis and ends beyond it
    shift = padding - dilation * ((kernel - 1) // 2)
    inner = (min(max(-(-(b + shift) // stride), 0), out_size) for b in cut.bounds[1:-1])
    out = cut_at((0, *inner, out_size))
    end = cut.size + padding
    needs = tuple(
        (low * stride - padding, min((high - 1) * stride - padding + reach + 1, end)) for low, high in out.extents
    )
    return Window(out, needs)


@lru_cache(maxsize=4096)
def transposed_window(cut: Cut, kernel: int, stride: int, padding: int, dilation: int, extra: int) -> Window:
    """Cut and needs of a transposed convolution along one axis; `extra` is its output padding.

    Input position i writes outputs i * stride - padding + dilation * [0, kernel).
    """
    reach = dilation * (kernel - 1)
    out_size = (cut.size - 1) * stride - 2 * padding + reach + 1 + extra
    out = cut_at((0, *(min(b * stride, out_size) for b in cut.bounds[1:-1]), out_size))
    needs = tuple(((low + padding - reach) // stride, (high - 1 + padding) // stride + 1) for low, high in out.extents)
    return Window(out, needs)


@lru_cache(maxsize=4096)
def padded(cut: Cut, before: int, after: int) -> Window:
    """Cut of an axis that grew by padding, with the halo that the operator behind the padding will need.

    A padding of (before, after) says that a window reaching that far follows. The rows it reads across an inner
    border are fetched together with the padding, into one buffer. `needs` is in coordinates of the unpadded axis.
    """
    total = cut.size + before + after
    bounds = (0, *(b + before for b in cut.bounds[1:-1]), total)
    extents = tuple((max(low - before, 0), min(high + after, total)) for low, high in _owned_extents(bounds))
    needs = tuple((low - before, high - before) for low, high in extents)
    return Window(Cut(bounds, extents), needs)


def overlap(a: Extent, b: Extent) -> Extent | None:
    """The positions in both extents, or None."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else None


def missing(have: Extent, need: Extent, size: int) -> list[Extent]:
    """The parts of `need`, within an axis of `size` positions, that are not in `have`."""
    low, high = max(need[0], 0), min(need[1], size)
    if low >= high:
        return []
    pieces = [(low, min(high, have[0])), (max(low, have[1]), high)]
    return [piece for piece in pieces if piece[0] < piece[1]]


def even_bounds(size: int, parts: int, ratio: int = 1, total: int | None = None) -> tuple[int, ...]:
    """Bounds of `size` latent rows over `parts`, as equal as can be, times `ratio`.

    With `total`, the last part takes whatever lies beyond the last whole multiple of the ratio.
    """
    inner = (ratio * (i * size // parts) for i in range(1, parts))
    return (0, *inner, ratio * size if total is None else total)


@lru_cache(maxsize=4096)
def covering(cut: Cut, needs: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """The needs, widened by the rows that a part owns and only others need: it has to hold them to send them."""
    covered: list[Extent] = []
    for part, (low, high) in enumerate(needs):
        for other in range(cut.parts):
            if other == part:
                continue
            for piece in missing(cut.extents[other], needs[other], cut.size):
                rows = overlap(piece, cut.owned(part))
                if rows:
                    low, high = min(low, rows[0]), max(high, rows[1])
        covered.append((low, high))
    return tuple(covered)
