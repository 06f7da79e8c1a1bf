"""Functions along dimensions that every rank has whole, above all those that take tensors apart and join them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named
from halovae.exact.layout import (
    Dim,
    GatheredFactor,
    Layout,
    global_length,
    is_sharded,
    layout_of,
    length,
    mark,
    plain,
    require_layout,
    shape_of,
    with_shape,
)
from halovae.exact.mesh import Mesh
from halovae.exact.rules.elementwise import align, fit
from halovae.exact.shard_mode import rule


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(mesh: Mesh, func: Any, tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Any:
    dim = dim if axis is None else axis
    # Causal caches start as empty one-dimensional tensors, which cat ignores.
    tensors = [t for t in tensors if layout_of(t) or shape_of(t) != (0,)] or list(tensors)
    if any((layout := layout_of(t)) and is_sharded(layout.dims[dim]) for t in tensors):
        raise NotExactError("tensors are joined along a sharded dimension")
    tensors = align(mesh, tensors)
    result = func(tensors, dim)
    shape = shape_of(result)
    common = _common_layout(tensors, dim % len(shape))
    return mark(result, common.replace(dim, plain(shape[dim])))


@rule(torch.stack)
def stack(mesh: Mesh, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    tensors = align(mesh, list(tensors))
    result = func(tensors, dim)
    dims = list(_common_layout(tensors, None).dims)
    dims.insert(dim % result.ndim, plain(len(tensors)))
    return mark(result, Layout(tuple(dims)))


def _common_layout(tensors: Sequence[Tensor], skip: int | None) -> Layout:
    """The layout shared by tensors that are to be joined, but for the dimension `skip`."""
    first, *others = map(require_layout, tensors)
    if any(layout.dims[dim] != first.dims[dim] for layout in others for dim in range(first.ndim) if dim != skip):
        raise NotExactError("the joined tensors are cut differently")
    return first


def _along(functions: Iterable[Any], place: int, default: int | None, refusal: str) -> None:
    """The rule of functions along dimensions: these have other lengths in the result, or are gone.

    Args:
        place: where among the arguments behind the tensor the dimensions stand.
        default: the one that is meant where none is given; None: all.
        refusal: why a shard can't do it along a dimension that is cut.
    """

    @rule(*functions)
    def along(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = require_layout(tensor)
        given = args[place] if len(args) > place else default
        given = kwargs.get("dim", kwargs.get("axis", given))
        dims = dims_of(None if isinstance(given, (bool, Tensor)) else given, layout.ndim)
        require_plain(layout, dims, refusal)
        result = func(tensor, *args, **kwargs)
        for part in [result] if isinstance(result, Tensor) else result:
            known = layout if part.ndim == layout.ndim else reduced(layout, dims)
            for dim in dims if known is layout else ():
                known = known.replace(dim, plain(part.shape[dim]))
            mark(part, known)
        return result


_PART, _SCAN = "it takes part of a sharded dimension", "it compares or scans positions of several shards"
_along(named("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"), 1, 0, _PART)
_along(named("unbind"), 0, 0, _PART)
_along(named("select"), 0, None, _PART)
_along(named("amax", "amin", "argmax", "argmin", "cumsum", "std", "var", "any", "all", "prod", "max", "min", "median",
             "sort", "argsort"), 0, None, _SCAN)  # fmt: skip
_along((*named("topk", "norm"), torch.linalg.vector_norm, torch.linalg.norm), 1, None, _SCAN)
_along((F.normalize,), 1, 1, "it normalises over a sharded dimension")


@rule(*named("index_select"))
def index_select(mesh: Mesh, func: Any, tensor: Tensor, dim: int, index: Tensor) -> Any:
    layout = require_layout(tensor, index)
    require_plain(layout, [dim], _PART)
    result = func(tensor, dim, index)
    return mark(result, layout.replace(dim, plain(result.shape[dim])))


@rule(*named("narrow"))
def narrow(mesh: Mesh, func: Any, tensor: Tensor, dim: int, start: int, length: int) -> Any:
    layout = require_layout(tensor)
    if (start, length) == (0, layout.whole[dim]):
        return mark(func(tensor, dim, start, layout.shape[dim]), layout)
    require_plain(layout, [dim], _PART)
    return mark(func(tensor, dim, start, length), layout.replace(dim, plain(length)))


@rule(Tensor.__getitem__)
def getitem(mesh: Mesh, func: Any, tensor: Tensor, index: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        raise NotExactError("positions of a sharded tensor index another one")
    result = func(tensor, index)
    return mark(result, indexed(layout, index, shape_of(result)))


@rule(Tensor.__setitem__)
def setitem(mesh: Mesh, func: Any, tensor: Tensor, index: Any, value: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        raise NotExactError("shards are written into a tensor that knows nothing of them")
    into = indexed(layout, index, tuple(tensor[index].shape))
    if isinstance(value, Tensor):
        value = fit(mesh, value, into.sharded_places)
        written = layout_of(value)
        if written and any(into.sharded_places.get(place) != dim for place, dim in written.sharded_places.items()):
            raise NotExactError("shards are written into shards that are cut differently")
    func(tensor, index, value)
    return None


_ALL = slice(None)


def indexed(layout: Layout, index: Any, shape: tuple[int, ...]) -> Layout:
    """The layout after basic indexing.

    Raises:
        NotExactError: a sharded dimension is indexed by anything but a full slice.
    """
    if isinstance(index, tuple) and _slices_what_is_whole(layout, index):
        return with_shape(layout, shape)
    dims: list[Dim] = []
    position = 0
    for entry in _entries(index, len(layout.dims)):
        if entry is None:
            dims.append(plain(1))
            continue
        dim = layout.dims[position]
        position += 1
        if isinstance(entry, slice) and entry == _ALL:
            dims.append(dim)
        elif isinstance(entry, slice):
            whole = global_length(dim)
            if is_sharded(dim) and entry.indices(whole) != (0, whole, 1):
                raise NotExactError(f"it takes {entry} of a sharded dimension")
            dims.append(dim if is_sharded(dim) else plain(len(range(*entry.indices(length(dim))))))
        elif is_sharded(dim):
            raise NotExactError("it picks positions of a sharded dimension")
        elif not isinstance(entry, int):
            dims.append(plain(-1))
    # An index list or tensor: its own length decides, and only one dimension may have one.
    unknown = [i for i, dim in enumerate(dims) if length(dim) < 0]
    if len(unknown) > 1 or len(dims) != len(shape):
        raise NotExactError("it indexes with several tensors")
    for i in unknown:
        dims[i] = plain(shape[i])
    return Layout(tuple(dims))


def _slices_what_is_whole(layout: Layout, index: tuple[Any, ...]) -> bool:
    """Whether there are slices alone, full ones where a dimension is sharded: the usual case."""
    for dim, entry in enumerate(index):
        if not isinstance(entry, slice) or (is_sharded(layout.dims[dim]) and entry != _ALL):
            return False
    return not any(isinstance(dim[0], GatheredFactor) for dim in layout.dims)


def _entries(index: Any, ndim: int) -> list[Any]:
    """The index as one entry per dimension (and None for new ones)."""
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    missing = [slice(None)] * (ndim - used)
    for place, entry in enumerate(entries):
        if entry is Ellipsis:
            return [*entries[:place], *missing, *entries[place + 1 :]]
    return [*entries, *missing]


def require_plain(layout: Layout, dims: Iterable[int], refusal: str) -> None:
    """Check that every rank has these dimensions whole."""
    if any(is_sharded(layout.dims[dim]) for dim in dims):
        raise NotExactError(refusal)


def dims_of(dim: Any, ndim: int) -> list[int]:
    """The dimensions that a function is asked to go along; where none is named, all."""
    if dim is None or dim == () or dim == []:
        return list(range(ndim))
    chosen: Sequence[int] = [dim] if isinstance(dim, int) else dim
    return [d % ndim for d in chosen]


def reduced(layout: Layout, dims: Sequence[int], keepdim: bool = False) -> Layout:
    """The layout without these dimensions, or with one position along each of them."""
    kept = [(plain(1) if i in dims else dim) for i, dim in enumerate(layout.dims) if keepdim or i not in dims]
    return Layout(tuple(kept))
