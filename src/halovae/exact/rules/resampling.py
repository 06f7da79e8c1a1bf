"""Resampling, and the convolution of an upsampling that waits for it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import Cut, coarsen, divides, refine
from halovae.exact.halo import Fill, extend, own, recut
from halovae.exact.layout import (
    Layout,
    each,
    global_length,
    is_sharded,
    layout_of,
    mark,
    plain,
    require_axis,
    with_lengths,
)
from halovae.exact.mesh import Mesh
from halovae.exact.registry import rule
from halovae.kernels.lazy import upsampled


@rule(F.interpolate)
def interpolate(
    mesh: Mesh,
    func: Any,
    tensor: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Nearest by whole factors is local; linear modes need one row on each side, cropped afterwards."""
    options = (mode, align_corners, recompute_scale_factor, antialias)
    layout = layout_of(tensor)
    if layout is None:
        return func(tensor, size, scale_factor, *options)
    tensor, layout = own(mesh, tensor, layout)
    n = layout.ndim - 2
    wholes = [global_length(dim) for dim in layout.dims[2:]]
    targets = [int(target) for target in each(size, n)] if size is not None else [
        int(length * factor) for length, factor in zip(wholes, each(scale_factor, n), strict=True)
    ]  # fmt: skip
    resized = layout
    for dim, (length, target) in enumerate(zip(wholes, targets, strict=True), start=2):
        resized = resized.replace(dim, plain(target)) if not is_sharded(layout.dims[dim]) else recut(
            mesh, resized, dim, _resampled(require_axis(layout, dim).cut, length, target, mode)
        )  # fmt: skip
    if mode in ("nearest", "nearest-exact"):
        local = resized.shape[2:] if size is not None else None
        return mark(func(tensor, local, scale_factor, *options), resized)
    if mode not in ("linear", "bilinear", "trilinear") or align_corners or antialias:
        raise NotExactError(f"resampling in mode {mode!r} looks at more than neighbours")
    if any(target % length for length, target in zip(wholes, targets, strict=True)):
        raise NotExactError("linear resampling by a factor that is not whole")
    factors = [target // length for length, target in zip(wholes, targets, strict=True)]
    return mark(_linear(mesh, func, tensor, layout, factors, options), resized)


def _resampled(cut: Cut, length: int, target: int, mode: str) -> Cut:
    if target % length == 0:
        return refine(cut, target // length)
    if length % target == 0 and mode == "nearest" and divides(cut, length // target):
        return coarsen(cut, length // target)
    raise NotExactError(f"resampling {length} rows to {target} is not by a whole factor")


def _linear(mesh: Mesh, func: Any, tensor: Tensor, layout: Layout, factors: list[int], options: Any) -> Tensor:
    needs = {
        dim: tuple((low - 1, high + 1) for low, high in require_axis(layout, dim).cut.extents)
        for dim in layout.sharded_dims
        if dim >= 2
    }
    wide = extend(mesh, tensor, layout, needs, fill=Fill("replicate"))
    result = func(wide, [f * s for f, s in zip(factors, wide.shape[2:], strict=True)], None, *options)
    for dim in needs:
        result = result.narrow(dim, factors[dim - 2], factors[dim - 2] * tensor.shape[dim])
    return result


def upsampled_convolution(
    mesh: Mesh, recipe: upsampled.Upsampled, layout: Layout, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Where the upsampling has not been done yet, the halo is a row of the small picture."""
    small = with_lengths(layout, recipe.base)
    for dim in layout.sharded_dims:
        small = recut(mesh, small, dim, coarsen(require_axis(layout, dim).cut, 2))
    needs = {
        dim: tuple((low - 1, high + 1) for low, high in require_axis(small, dim).cut.extents)
        for dim in small.sharded_dims
    }
    wide = extend(mesh, recipe.base, small, needs, later=True)
    result = upsampled.upsampled_convolution(recipe, weight, bias, wide, tuple(needs))
    return mark(result, with_lengths(layout, result))
