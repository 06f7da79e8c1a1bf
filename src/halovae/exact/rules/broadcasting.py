"""The layout of what elementwise functions make of several operands."""

from __future__ import annotations

from collections.abc import Sequence

from halovae.base.errors import NotExactError
from halovae.exact.layout import Dim, GatheredFactor, Layout, is_sharded, length, plain


def broadcast(layouts: Sequence[tuple[Layout | None, tuple[int, ...]]], shape: Sequence[int]) -> Layout:
    """The layout of an elementwise result of this shape, of operands (layout or None, shape) aligned at the last dim.

    Raises:
        NotExactError: an operand without layout varies along a dimension that is sharded in another one.
    """
    if (common := _common(layouts, shape)) is not None:
        return common
    dims: list[Dim] = []
    for position in range(-len(shape), 0):
        present = [_dim_at(layout, own, position) for layout, own in layouts]
        sharded = [dim for dim in present if is_sharded(dim)]
        if not sharded:
            remembered = (dim for dim in present if isinstance(dim[0], GatheredFactor))
            dims.append(next(remembered, plain(shape[position])))
            continue
        if any(dim != sharded[0] for dim in sharded):
            raise NotExactError(f"operands are cut differently: {sharded[0]} and {sharded[1:]}")
        if any(not is_sharded(dim) and length(dim) != 1 for dim in present):
            raise NotExactError(f"an operand that knows nothing of the shards has {max(map(length, present))} rows")
        dims.append(sharded[0])
    return Layout(tuple(dims))


def _common(layouts: Sequence[tuple[Layout | None, tuple[int, ...]]], shape: Sequence[int]) -> Layout | None:
    """The one layout among the operands, where those without have one position along what is cut: the usual case."""
    first = next((layout for layout, _ in layouts if layout), None)
    if first is None or first.shape != tuple(shape) or any(layout not in (first, None) for layout, _ in layouts):
        return None
    cut = [dim - first.ndim for dim in first.sharded_dims]
    varies = any(layout is None and -dim <= len(own) and own[dim] != 1 for layout, own in layouts for dim in cut)
    return None if varies else first


def _dim_at(layout: Layout | None, shape: tuple[int, ...], position: int) -> Dim:
    if -position > len(shape):
        return plain(1)
    return layout.dims[position] if layout else plain(shape[position])
