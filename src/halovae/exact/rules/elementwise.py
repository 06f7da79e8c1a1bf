"""Functions that act on each position by itself: right on a shard as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named, writes
from halovae.exact.halo import own, own_part, redistribute
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    GatheredFactor,
    Layout,
    axis_factor,
    global_length,
    is_sharded,
    layout_of,
    length,
    mark,
    plain,
    shape_of,
)
from halovae.exact.mesh import Mesh
from halovae.exact.shard_mode import rule

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
