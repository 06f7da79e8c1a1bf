"""Into shards and back: whole tensors are cut at the entry of a network and put together at its exit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import HalovaeError, NotExactError
from halovae.base.functions import outside_modes
from halovae.base.geometry import Extent, cut_at
from halovae.base.trees import pictures_in
from halovae.exact.halo import extend, gather_dim, own
from halovae.exact.layout import AxisFactor, Layout, layout_of, mark, plain, require_axis
from halovae.exact.mesh import Mesh

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""Where rows and where columns are cut: (0, ..., height) and (0, ..., width)."""


@outside_modes
def scatter(mesh: Mesh, tensor: Tensor, bounds: Bounds) -> Tensor:
    """This rank's shard of a tensor `[..., height, width]` that every rank has whole, in memory of its own."""
    dims = [plain(size) for size in tensor.shape]
    for axis, axis_bounds in enumerate(bounds):
        if mesh.shape[axis] == 1 or tensor.shape[axis - 2] == 1:
            continue
        cut, part, dim = cut_at(axis_bounds), mesh.part(axis), axis - 2
        if (cut.size, cut.parts) != (tensor.shape[dim], mesh.shape[axis]):
            raise HalovaeError(f"cuts {axis_bounds} of {tensor.shape[dim]} rows for {mesh.shape[axis]} parts")
        low, high = cut.owned(part)
        tensor = tensor.narrow(dim, low, high - low)
        dims[dim] = (AxisFactor(high - low, axis, cut),)
    return mark(own_copy(tensor), Layout(tuple(dims)))


def own_copy(tensor: Tensor) -> Tensor:
    """A copy that tells, by its version, whether a network has written into it."""
    with torch.inference_mode(False):
        return tensor.clone()


@outside_modes
def gather(mesh: Mesh, tensor: Tensor, first_only: bool = False) -> Tensor:
    """The whole tensor on every rank of the mesh, or (`first_only`) on its first rank and the own shard elsewhere."""
    layout = layout_of(tensor)
    if layout is None:
        return tensor
    if first_only:
        return _gather_first(mesh, *own(mesh, tensor, layout))
    for dim in layout.sharded_dims:
        tensor = gather_dim(mesh, tensor, layout, dim)
        layout = layout.replace(dim, plain(tensor.shape[dim]))
    return tensor


def _gather_first(mesh: Mesh, shard: Tensor, layout: Layout) -> Tensor:
    """Along the first axis to the ranks at its beginning, then among those along the second one."""
    tensor = shard
    factors = [(require_axis(layout, dim), dim) for dim in layout.sharded_dims]
    for factor, dim in sorted(factors, key=lambda pair: pair[0].axis):
        if any(mesh.part(axis) for axis in range(factor.axis)):
            break
        needs = [(0, factor.cut.size), *factor.cut.extents[1:]]
        tensor = extend(mesh, tensor, layout, {dim: tuple(needs)})
        if mesh.part(factor.axis) == 0:
            layout = layout.replace(dim, plain(factor.cut.size))
    return _unmarked(shard if any(mesh.coordinates) else tensor)


def own_rows(mesh: Mesh, tensor: Tensor) -> Tensor:
    """This rank's shard as an ordinary tensor."""
    layout = layout_of(tensor)
    return _unmarked(own(mesh, tensor, layout)[0]) if layout else tensor


def _unmarked(tensor: Tensor) -> Tensor:
    """The tensor without a layout; another object, because the network may still hold this one."""
    return tensor.view(tensor.shape) if layout_of(tensor) else tensor


def extents(mesh: Mesh, tensor: Tensor) -> dict[str, Extent]:
    """Which rows and columns of the whole this rank's shard is, as {"height": (low, high), "width": (low, high)}."""
    layout = layout_of(tensor)
    found: dict[str, Extent] = {"height": (0, tensor.shape[-2]), "width": (0, tensor.shape[-1])}
    if layout is None:
        return found
    for factor in (require_axis(layout, dim) for dim in layout.sharded_dims):
        found[("height", "width")[factor.axis]] = factor.cut.owned(mesh.part(factor.axis))
    return found


def first_tensor(value: Any) -> Tensor:
    """The first picture-like tensor (4-D or 5-D) in a result.

    Raises:
        NotExactError: there is none.
    """
    pictures = pictures_in(value)
    if not pictures:
        raise NotExactError(f"the result {type(value).__name__} holds no picture or video tensor")
    return pictures[0]
