"""Which dimensions of a local tensor are cut, and what views do to that.

A tensor dimension is a tuple of factors, outermost first. A factor is either plain (every rank has all its
positions) or one spatial axis of the mesh (each rank has its own rows). `[B, C, H, W]` has four
dimensions of one factor each; after `flatten(2)` the third one has the two factors (height, width). Reshapes then
are a walk along the factors, and no operator rule has to guess what a size means.

The layout travels as an attribute of the local tensor. Tensors without one are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import MIN_ROWS, Cut, coarsen, divides, narrowest, refine
from halovae.base.private_torch import without_functions


@dataclass(frozen=True)
class Factor:
    """`size` positions, which every rank has."""

    size: int


@dataclass(frozen=True)
class AxisFactor(Factor):
    """This rank's `size` positions of a spatial axis of the mesh."""

    axis: int
    cut: Cut


@dataclass(frozen=True)
class GatheredFactor(Factor):
    """All positions of a dimension that was cut, which every rank has for one product; `shards` is what it was."""

    shards: tuple[Factor, ...]


Dim = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """The factors of every dimension of a local tensor."""

    dims: tuple[Dim, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Calculated once: layouts are looked up in caches several times for each operator."""
        return hash(self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @cached_property
    def sharded_dims(self) -> list[int]:
        return [i for i, dim in enumerate(self.dims) if is_sharded(dim)]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the shard."""
        return tuple(length(dim) for dim in self.dims)

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """The shape of the un-parallel tensor."""
        return tuple(global_length(dim) for dim in self.dims)

    @cached_property
    def sharded_places(self) -> dict[int, Dim]:
        """The sharded dimensions, by their places counted from the last one, as broadcasting counts them."""
        return {i - len(self.dims): self.dims[i] for i in self.sharded_dims}

    @cached_property
    def cuts(self) -> list[Cut]:
        """Of all sharded factors."""
        return [factor.cut for dim in self.dims for factor in dim if isinstance(factor, AxisFactor)]

    @cached_property
    def repeats(self) -> bool:
        """Whether one axis is in two places: a shard would not have the pairs of its own and others' positions."""
        axes = [factor.axis for dim in self.dims for factor in dim if isinstance(factor, AxisFactor)]
        return len(set(axes)) < len(axes)

    @cached_property
    def narrowest(self) -> int:
        """Positions that the smallest part of any axis owns."""
        return min(map(narrowest, self.cuts), default=MIN_ROWS)

    def replace(self, dim: int, factors: Dim) -> Layout:
        return _replaced(self, dim % len(self.dims), factors)


@lru_cache(maxsize=4096)
def _replaced(layout: Layout, dim: int, factors: Dim) -> Layout:
    return Layout((*layout.dims[:dim], factors, *layout.dims[dim + 1 :]))


def plain(size: int) -> Dim:
    return (Factor(size),)


def is_sharded(dim: Dim) -> bool:
    for factor in dim:  # noqa: SIM110 (a loop takes half the time of `any`, and every operator asks)
        if isinstance(factor, AxisFactor):
            return True
    return False


def length(dim: Dim) -> int:
    return prod(factor.size for factor in dim)


def axis_factor(dim: Dim) -> AxisFactor | None:
    """The factor of a dimension that is one whole spatial axis, else None."""
    return dim[0] if len(dim) == 1 and isinstance(dim[0], AxisFactor) else None


def require_axis(layout: Layout, dim: int) -> AxisFactor:
    """The factor of a dimension that must be one whole spatial axis.

    Raises:
        NotExactError: height and width are flattened together in it.
    """
    factor = axis_factor(layout.dims[dim])
    if factor is None:
        raise NotExactError("a dimension in which height and width are flattened is treated as one axis")
    return factor


def axes_in(dims: Iterable[Dim]) -> set[int]:
    """The mesh axes that these dimensions are cut along."""
    return {factor.axis for dim in dims for factor in dim if isinstance(factor, AxisFactor)}


def positions(factor: Factor) -> int:
    """Positions of a factor over all ranks."""
    return factor.cut.size if isinstance(factor, AxisFactor) else factor.size


def global_length(dim: Dim) -> int:
    """Positions along a dimension over all ranks."""
    return prod(map(positions, dim))


# ---- the attribute -------------------------------------------------------------------------------------------------

_ATTRIBUTE = "_halovae_layout"


def layout_of(value: object) -> Layout | None:
    """The layout of a sharded tensor; None for everything else."""
    return getattr(value, _ATTRIBUTE, None) if isinstance(value, Tensor) else None


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The local shape. Function modes are passed by: they would take longer than everything else here."""
    with without_functions():
        return tuple(tensor.shape)


def require_rows(thinnest: int) -> None:
    """Check that no part is so thin that its size is ambiguous; the same answer on every rank."""
    if thinnest < MIN_ROWS:
        raise NotExactError(f"a shard would have fewer than {MIN_ROWS} rows: use fewer ranks")


def require_layout(tensor: Tensor, *weights: object) -> Layout:
    """The layout of what an operator works on.

    Raises:
        NotExactError: it is whole where something else is a shard, or its weights are made of shards.
    """
    if any(map(layout_of, weights)):
        raise NotExactError("its weights are made of shards")
    layout = layout_of(tensor)
    if layout is None:
        raise NotExactError("a tensor that knows nothing of the shards meets one")
    return layout


def mark(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Attach a layout (None, or one without sharded dimensions: none) and return the tensor."""
    if layout is not None and layout.sharded_dims:
        require_rows(layout.narrowest)
        if layout.repeats:
            raise NotExactError("all positions of an axis meet all of them, of which a shard has a part only")
        if layout.shape != (shape := shape_of(tensor)):
            raise NotExactError(f"its result has the shape {shape} where the shard's is {layout.shape}")
        setattr(tensor, _ATTRIBUTE, layout)
    elif hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)
    return tensor


# ---- views ---------------------------------------------------------------------------------------------------------


def split_factor(factor: Factor, outer: int) -> tuple[Factor, Factor]:
    """A factor as (outer, inner), `outer` of the whole; an axis keeps its rows in the outer one, coarser ones.

    Raises:
        NotExactError: the factor or its cut doesn't divide.
    """
    inner, rest = divmod(positions(factor), outer)
    if rest:
        raise NotExactError(f"a view splits {positions(factor)} positions into {outer} parts")
    if not isinstance(factor, AxisFactor):
        return Factor(outer), Factor(inner)
    if not divides(factor.cut, inner):
        raise NotExactError(f"a view groups {inner} rows, which does not divide the shards {factor.cut.bounds}")
    return AxisFactor(factor.size // inner, factor.axis, coarsen(factor.cut, inner)), Factor(inner)


def merge_factors(factors: Iterable[Factor]) -> Dim:
    """One dimension of these factors; a plain factor inside an axis makes that axis finer."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if isinstance(factor, AxisFactor) or last is None or (isinstance(last, AxisFactor) and not factor.size):
            merged.append(factor if isinstance(factor, AxisFactor) else Factor(factor.size))
        elif isinstance(last, AxisFactor):
            merged[-1] = AxisFactor(last.size * factor.size, last.axis, refine(last.cut, factor.size))
        else:
            merged[-1] = Factor(last.size * factor.size)
    merged = [factor for factor in merged if isinstance(factor, AxisFactor) or factor.size != 1]
    return tuple(merged) or plain(1)


@lru_cache(maxsize=4096)
def reshaped(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """The layout after the whole tensor was viewed with this shape (no -1).

    Raises:
        NotExactError: the view cuts through a sharded axis.
    """
    if shape == layout.whole:
        return layout
    if prod(shape) != prod(layout.whole):
        raise NotExactError(f"there is no view of {layout.whole} as {shape}")
    pending = [f for dim in layout.dims for f in dim if positions(f) != 1]
    # Without elements, the dimensions from the first to the last empty one are made of what the others leave.
    first = shape.index(0) if 0 in shape else len(shape)
    last = len(shape) - shape[::-1].index(0) if 0 in shape else len(shape)
    before, pending = _walk(pending, shape[:first])
    pending.reverse()
    after, pending = _walk(pending, shape[last:][::-1], inwards=True)
    if any(isinstance(f, AxisFactor) for f in pending) and last - first > 1:
        raise NotExactError(f"a view of {layout.whole}, which has no elements, as {shape}")
    between = [merge_factors(pending[::-1])] if last - first == 1 else list(map(plain, shape[first:last]))
    return Layout((*before, *between, *after[::-1]))


def _walk(pending: list[Factor], shape: Sequence[int], inwards: bool = False) -> tuple[list[Dim], list[Factor]]:
    """Take the factors of each dimension from the beginning of `pending`; also what is left.

    Args:
        pending: factors, none of one position.
        shape: of the whole, without a 0.
        inwards: factors and sizes come from the last one on.
    """
    pending = pending[::-1]
    dims: list[Dim] = []
    for size in shape:
        taken: list[Factor] = []
        while size > 1:
            if not pending or not positions(pending[-1]):
                taken.append(Factor(size))  # of a tensor without elements
                break
            factor = pending.pop()
            if size % positions(factor) == 0:
                taken.append(factor)
                size //= positions(factor)
                continue
            while positions(factor) % size and pending and not is_sharded((factor, pending[-1])):
                factor = Factor(factor.size * pending.pop().size)
            parts = split_factor(factor, positions(factor) // size if inwards else size)
            taken.append(parts[1] if inwards else parts[0])
            pending.append(parts[0] if inwards else parts[1])
            size = 1
        dims.append(merge_factors(taken[::-1] if inwards else taken))
    return dims, pending[::-1]


@lru_cache(maxsize=4096)
def permuted(layout: Layout, order: tuple[int, ...]) -> Layout:
    return Layout(tuple(layout.dims[i] for i in order))


def each(value: Any, n: int) -> list[Any]:
    """One value per dimension, where torch takes one for all."""
    values = [value] if isinstance(value, (int, float)) else list(value)
    return values * n if len(values) == 1 else values


def with_lengths(layout: Layout, result: Tensor) -> Layout:
    """The layout with the plain dimensions' lengths taken from the result."""
    return with_shape(layout, shape_of(result))


@lru_cache(maxsize=4096)
def with_shape(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """The layout with the plain dimensions' lengths taken from a shape of as many dimensions."""
    dims = zip(layout.dims, shape, strict=True)
    return Layout(tuple(dim if is_sharded(dim) else plain(size) for dim, size in dims))
