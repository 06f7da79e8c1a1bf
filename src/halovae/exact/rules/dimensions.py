"""Functions that act on each position by itself, which are right on a shard as they are, and along dimensions.

Along a sharded dimension, statistics, sums and means are completed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named, writes
from halovae.comm import all_gather
from halovae.exact.halo import own, own_part, redistribute
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    GatheredFactor,
    Layout,
    axes_in,
    axis_factor,
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
from halovae.exact.shard_mode import rule
from halovae.kernels import group_norm as norms

BROADCASTING = (
    "add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum",
    "eq", "ne", "lt", "le", "gt", "ge", "where", "lerp", "addcmul", "addcdiv", "clamp", "clip", "logical_and",
    "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "atan2", "copysign",
    "truediv", "floordiv", "mod", "and", "or", "invert",
    "masked_fill", "threshold", "nan_to_num", "isnan", "isinf", "isfinite",
    "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos",
    "tan", "tanh", "atanh", "sinh", "cosh", "asinh", "erf", "round", "floor", "ceil", "trunc", "frac", "sigmoid",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "softplus", "hardtanh",
    "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softsign", "copy", "fill", "zero",
)  # fmt: skip
"""Elementwise functions of one or more operands."""

SELF_SHAPED = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long", "cpu", "cuda",
    "contiguous", "clone", "detach", "alpha_dropout", "requires_grad_",
    "empty_like", "positive",
)  # fmt: skip
"""Functions whose result has the positions of their first operand, whatever the others are."""


@rule(*named(*BROADCASTING))
def broadcasting(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    aligned = align(mesh, operands)
    if aligned is not operands:
        if aligned[0] is not operands[0] and writes(func):
            knows = "is cut differently from the others" if layout_of(operands[0]) else "knows nothing of the shards"
            raise NotExactError(f"an in-place operand {knows}")
        moved = dict(zip(map(id, operands), aligned, strict=True))
        args = tuple(moved.get(id(arg), arg) for arg in args)
        kwargs = {name: moved.get(id(value), value) for name, value in kwargs.items()}
    result = func(*args, **kwargs)
    if result is NotImplemented:  # a comparison with something that is no number
        return result
    if not isinstance(result, Tensor):
        raise NotExactError("it lists positions")
    return mark(result, elementwise_layout(aligned, shape_of(result)))


@rule(*named(*SELF_SHAPED))
def self_shaped(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    return mark(result, layout_of(tensor)) if isinstance(result, Tensor) else result


@rule(*named("dropout"), F.dropout1d, F.dropout2d, F.dropout3d)
def dropout(mesh: Mesh, func: Any, tensor: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise NotExactError("dropout is active: call vae.eval() first")
    return tensor


def elementwise_layout(operands: list[Tensor], shape: tuple[int, ...]) -> Layout:
    """The layout of an elementwise result."""
    if (first := layout_of(operands[0])) and all(layout_of(operand) is first for operand in operands):
        return first
    return broadcast([(layout_of(operand), shape_of(operand)) for operand in operands], shape)


def align(mesh: Mesh, operands: list[Tensor]) -> list[Tensor]:
    """The operands, cut alike: where bounds or halos differ, all follow the first sharded operand.

    Those of which every rank has the whole, such as coordinates of all rows, are cut as well.
    """
    layouts = [layout for operand in operands if (layout := layout_of(operand))]
    if any(layout is not layouts[0] for layout in layouts):
        for position in _cut_differently(tuple(layouts)):
            operands = [_without_halo(mesh, operand, position) for operand in operands]
            first = next(factor for o in operands if (factor := _axis_at(o, position)))
            operands = [_follow(mesh, operand, position, first.cut.bounds) for operand in operands]
        layouts = [layout for operand in operands if (layout := layout_of(operand))]
    elif len(layouts) == len(operands):
        return operands
    places: dict[int, Dim] = {}
    for layout in layouts:
        places |= layout.sharded_places
    fitted = [fit(mesh, operand, places) for operand in operands]
    return operands if all(a is b for a, b in zip(fitted, operands, strict=True)) else fitted


def fit(mesh: Mesh, tensor: Tensor, places: dict[int, Dim]) -> Tensor:
    """The tensor, cut where it is whole and others are sharded.

    Args:
        places: how the others are cut, by the place of the dimension counted from the last one.
    """
    layout = layout_of(tensor)
    if layout and len(places) <= len(layout.sharded_dims) and places.keys() <= layout.sharded_places.keys():
        return tensor
    shape = shape_of(tensor)
    for place, dim in places.items():
        if -place > len(shape) or shape[place] == 1 or (layout and is_sharded(layout.dims[place])):
            continue
        if shape[place] != global_length(dim):
            raise NotExactError(f"an operand of {shape[place]} positions meets {global_length(dim)} of the picture")
        layout = (layout or Layout(tuple(map(plain, shape)))).replace(place, dim)
        tensor = mark(own_part(mesh, tensor, place, dim), layout)
    return tensor


@lru_cache(maxsize=4096)
def _cut_differently(layouts: tuple[Layout, ...]) -> tuple[int, ...]:
    """The dimensions, counted from the last one, along which these layouts are cut in several ways."""
    found: list[int] = []
    for position in range(-max(layout.ndim for layout in layouts), 0):
        dims = [layout.dims[position] for layout in layouts if -position <= layout.ndim]
        if len({factor for dim in dims if (factor := axis_factor(dim))}) > 1:
            found.append(position)
    return tuple(found)


def _axis_at(operand: Tensor, position: int) -> AxisFactor | None:
    layout = layout_of(operand)
    return axis_factor(layout.dims[position]) if layout and -position <= len(layout.dims) else None


def _without_halo(mesh: Mesh, operand: Tensor, position: int) -> Tensor:
    layout = layout_of(operand)
    return mark(*own(mesh, operand, layout)) if layout and _axis_at(operand, position) else operand


def _follow(mesh: Mesh, operand: Tensor, position: int, bounds: tuple[int, ...]) -> Tensor:
    factor, layout = _axis_at(operand, position), layout_of(operand)
    if factor is None or layout is None or factor.cut.bounds == bounds:
        return operand
    if factor.cut.size != bounds[-1]:
        raise NotExactError(f"operands of {factor.cut.size} and {bounds[-1]} rows meet")
    return redistribute(mesh, operand, layout, position % operand.ndim, bounds)


# ---- layouts of several operands ------------------------------------------------------------------------------------


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


# ---- along dimensions that every rank has whole: taking tensors apart, joining them ----------------------------------


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


# ---- norms -----------------------------------------------------------------------------------------------------------


@rule(F.group_norm)
def group_norm(
    mesh: Mesh,
    func: Any,
    tensor: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`[N, C, ...]`, normalised over each group of channels and all positions behind.

    Count, mean and sum of squared deviations of the shards are merged exactly, in float32 or better.
    """
    layout = require_layout(tensor, weight, bias)
    axes = axes_in(layout.dims[1:])
    if not axes or 0 in layout.shape:
        return mark(func(tensor, num_groups, weight, bias, eps), layout)
    if is_sharded(layout.dims[1]):
        raise NotExactError("the channels of a group norm are sharded")
    tensor, layout = own(mesh, tensor, layout)
    # The count too is gathered, of what each shard has: together it is the whole picture's.
    found = all_gather(mesh.comm, norms.moments(tensor, num_groups), mesh.ranks_along(axes))
    return mark(norms.normalized(tensor, found, weight, bias, eps), layout)


@rule(F.layer_norm, F.rms_norm)
def over_last_dims(
    mesh: Mesh, func: Any, tensor: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    layout = require_layout(tensor, *args, *kwargs.values())
    require_plain(layout, range(-len(normalized_shape), 0), "it normalises over a sharded dimension")
    return mark(func(tensor, normalized_shape, *args, **kwargs), layout)


@rule(F.batch_norm)
def batch_norm(mesh: Mesh, func: Any, tensor: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor, mean, var, *args, *kwargs.values())
    training = kwargs.get("training", args[2] if len(args) > 2 else False)
    if training or is_sharded(layout.dims[1]):
        raise NotExactError("batch statistics are in use: call vae.eval() first")
    return mark(func(tensor, mean, var, *args, **kwargs), layout)


@rule(F.instance_norm)
def instance_norm(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor, *args, *kwargs.values())
    if any(is_sharded(dim) and length(dim) for dim in layout.dims[2:]):
        raise NotExactError("it normalises over sharded dimensions")
    return mark(func(tensor, *args, **kwargs), layout)


# ---- reductions -----------------------------------------------------------------------------------------------------


def sum_over_ranks(mesh: Mesh, partial: Tensor, axes: set[int]) -> Tensor:
    """The sum of every rank's partial sums, added in the same order on all ranks."""
    return torch.stack(all_gather(mesh.comm, partial, mesh.ranks_along(axes))).sum(0)


@rule(*named("sum", "mean"))
def sum_or_mean(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout = require_layout(tensor)
    dims, keepdim, dtype = _asked(tensor.ndim, *args, **kwargs)
    if not any(is_sharded(layout.dims[d]) for d in dims):
        return mark(func(tensor, dims, keepdim, dtype=dtype), reduced(layout, dims, keepdim))
    tensor, layout = own(mesh, tensor, layout)
    axes = axes_in(layout.dims[d] for d in dims)
    total = sum_over_ranks(mesh, torch.sum(tensor, dims, keepdim, dtype=dtype or _wide(tensor.dtype)), axes)
    if getattr(func, "__name__", "") == "mean":
        total = total / prod(global_length(layout.dims[d]) for d in dims)
    if dtype is None and tensor.is_floating_point():
        total = total.to(tensor.dtype)
    return mark(total, reduced(layout, dims, keepdim))


def _asked(
    ndim: int, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: torch.dtype | None = None
) -> tuple[list[int], bool, torch.dtype | None]:
    """Dimensions, keepdim and dtype, however the caller spelled them."""
    return dims_of(axis if dim is None else dim, ndim), keepdim, dtype


@rule(*named("softmax", "log_softmax"))
def softmax(mesh: Mesh, func: Any, tensor: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Over a sharded dimension, largest values and sums are completed over the ranks, in float32 or better."""
    layout = require_layout(tensor)
    if dim is None:
        dim = 0 if tensor.ndim in (0, 1, 3) else 1  # torch's old choice
    if not is_sharded(layout.dims[dim]):
        return mark(func(tensor, dim, *args, **kwargs), layout)
    wanted = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), tensor.dtype)
    tensor, layout = own(mesh, tensor, layout)
    wide = tensor.to(wanted).to(_wide(wanted) or wanted)
    axes = axes_in([layout.dims[dim]])
    largest = torch.stack(all_gather(mesh.comm, wide.amax(dim, keepdim=True), mesh.ranks_along(axes))).amax(0)
    wide = wide - torch.nan_to_num(largest, nan=torch.nan, posinf=torch.inf, neginf=0.0)
    total = sum_over_ranks(mesh, wide.exp().sum(dim, keepdim=True), axes)
    result = wide - total.log() if "log" in func.__name__ else wide.exp() / total
    return mark(result.to(wanted), layout)


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to add in: at least float32; None: torch's choice."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
