"""One buffer with the local rows, the neighbours' rows and the padding.

Every operator that sees beyond a pixel says which rows it needs; `extend` gets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from halovae.base.functions import outside_modes
from halovae.base.geometry import Cut, Extent, covering, cut_at, overlap
from halovae.exact.layout import AxisFactor, Dim, Factor, Layout, global_length, length, mark, require_axis
from halovae.exact.mesh import Mesh, Transfer, transfers
from halovae.kernels.fast_rules import fits
from halovae.kernels.fill import Fill, fill_outside, region_of
from halovae.kernels.gpu import copies
from halovae.kernels.lazy.deferred import Deferred
from halovae.kernels.lazy.joined import Halo, Joined, parts_in
from halovae.kernels.memory_format import is_channels_last, memory_format

ZEROS = Fill()
_CONTIGUOUS = torch.contiguous_format


def extend(
    mesh: Mesh,
    tensor: Tensor,
    layout: Layout,
    needs: Mapping[int, tuple[Extent, ...]],
    pads: Mapping[int, Extent] | None = None,
    fill: Fill = ZEROS,
    later: bool = False,
) -> Tensor:
    """This rank's `needs`, as one tensor.

    Args:
        layout: of the tensor; halos already present are used, not fetched again.
        needs: per sharded dimension, the global positions that each part needs. Beyond the axis: `fill`.
        pads: per plain dimension, how many positions to add (before, after), by `fill` too.
        fill: what lies beyond the axis.
        later: whether a kernel follows that can make use of a tensor that is not computed yet.

    Returns:
        A view when everything is already there, else a new tensor. It carries no layout.
    """
    pads = {dim: pad for dim, pad in (pads or {}).items() if pad != (0, 0)}
    if not pads and all(_is_present(layout, dim, need) for dim, need in needs.items()):
        return _narrow_to(mesh, tensor, layout, needs)
    if later and len(needs) == 2:  # The second exchange has corners in it that the first one brings.
        first, second = needs
        tensor = extend(mesh, tensor, layout, {first: needs[first]}, fill=fill)
        return extend(mesh, tensor, layout, {second: needs[second]}, pads, fill, later)
    if later and (deferred := _extend_later(mesh, tensor, layout, needs, pads, fill)) is not None:
        return deferred
    covered = {dim: covering(require_axis(layout, dim).cut, need) for dim, need in needs.items()}
    starts, shape, valid = _frame(mesh, tensor, layout, covered, pads)
    kept = memory_format(tensor.ndim, is_channels_last(tensor))
    buffer = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=kept)
    copies.copy(region_of(buffer, valid), _narrow_to(mesh, tensor, layout, covered))
    for dim, need in needs.items():
        _fetch(mesh, buffer, layout, dim, need, starts[dim], valid)
        fill_outside(buffer, dim, valid, fill)
        low, high = need[mesh.part(require_axis(layout, dim).axis)]
        valid[dim] = (low - starts[dim], high - starts[dim])
    for dim in pads:
        fill_outside(buffer, dim, valid, fill)
    return region_of(buffer, valid)


def own(mesh: Mesh, tensor: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The tensor without halos."""
    for dim in layout.sharded_dims:
        if any(isinstance(f, AxisFactor) and f.cut.has_halo for f in layout.dims[dim]):
            bounds = require_axis(layout, dim).cut.bounds
            tensor = extend(mesh, tensor, layout, {dim: cut_at(bounds).extents})
            layout = recut(mesh, layout, dim, cut_at(bounds))
    return tensor, layout


def recut(mesh: Mesh, layout: Layout, dim: int, cut: Cut) -> Layout:
    """The layout with dimension `dim`, one whole spatial axis, cut in another way."""
    axis = require_axis(layout, dim).axis
    return layout.replace(dim, (AxisFactor(cut.present(mesh.part(axis)), axis, cut),))


def redistribute(mesh: Mesh, tensor: Tensor, layout: Layout, dim: int, bounds: tuple[int, ...]) -> Tensor:
    """The tensor with one axis cut at other bounds; carries its new layout."""
    moved = extend(mesh, tensor, layout, {dim: cut_at(bounds).extents})
    return mark(moved, recut(mesh, layout, dim, cut_at(bounds)))


def gather_dim(mesh: Mesh, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
    """The tensor with one dimension whole, in the order of the un-parallel tensor; carries its new layout."""
    dim %= len(layout.dims)
    factors = layout.dims[dim]
    split = Layout((*layout.dims[:dim], *((f,) for f in factors), *layout.dims[dim + 1 :]))
    tensor = tensor.reshape(split.shape)
    for offset, factor in enumerate(factors):
        if not isinstance(factor, AxisFactor):
            continue
        whole = ((0, factor.cut.size),) * factor.cut.parts
        tensor = extend(mesh, tensor, split, {dim + offset: whole})
        split = split.replace(dim + offset, (Factor(factor.cut.size),))
    merged = layout.replace(dim, (Factor(prod(tensor.shape[dim : dim + len(factors)])),))
    return mark(tensor.reshape(merged.shape), merged)


def own_part(mesh: Mesh, tensor: Tensor, dim: int, factors: Dim) -> Tensor:
    """This rank's part of a dimension that every rank has whole and that consists of these factors."""
    dim %= tensor.ndim
    tensor = tensor.unflatten(dim, [global_length((factor,)) for factor in factors])
    for place, factor in enumerate(factors, start=dim):
        if isinstance(factor, AxisFactor):
            low, high = factor.cut.extents[mesh.part(factor.axis)]
            tensor = tensor.narrow(place, low, high - low)
    return tensor.flatten(dim, dim + len(factors) - 1)


def _is_present(layout: Layout, dim: int, needs: tuple[Extent, ...]) -> bool:
    """Whether every rank already has what it needs; the same answer on all ranks."""
    have = require_axis(layout, dim).cut.extents
    return all(h[0] <= n[0] and n[1] <= h[1] for h, n in zip(have, needs, strict=True))


def _narrow_to(mesh: Mesh, tensor: Tensor, layout: Layout, needs: Mapping[int, tuple[Extent, ...]]) -> Tensor:
    """The part of the local tensor inside this rank's needs."""
    for dim, need in needs.items():
        low, high, start = _kept(mesh, layout, dim, need)
        if high - low != length(layout.dims[dim]):
            tensor = tensor.narrow(dim, low - start, high - low)
    return tensor


def _kept(mesh: Mesh, layout: Layout, dim: int, needs: tuple[Extent, ...]) -> tuple[int, int, int]:
    """Global (low, high) of what this rank both has and needs, and where its local tensor starts."""
    factor = require_axis(layout, dim)
    part = mesh.part(factor.axis)
    have = factor.cut.extents[part]
    kept = overlap(have, needs[part]) or (needs[part][0], needs[part][0])
    return kept[0], kept[1], have[0] if kept[0] < kept[1] else kept[0]


Frame = tuple[dict[int, int], list[int], list[Extent]]


def _frame(
    mesh: Mesh, tensor: Tensor, layout: Layout, needs: Mapping[int, tuple[Extent, ...]], pads: Mapping[int, Extent]
) -> Frame:
    """Global start of the buffer per sharded dim, the buffer's shape, and which of it the local tensor fills."""
    starts: dict[int, int] = {}
    shape = list(tensor.shape)
    valid: list[Extent] = [(0, size) for size in shape]
    for dim, need in needs.items():
        low, high = need[mesh.part(require_axis(layout, dim).axis)]
        kept_low, kept_high, _ = _kept(mesh, layout, dim, need)
        starts[dim], shape[dim] = low, high - low
        valid[dim] = (kept_low - low, kept_high - low)
    for dim, (before, after) in pads.items():
        size = length(layout.dims[dim])
        shape[dim], valid[dim] = before + size + after, (before, before + size)
    return starts, shape, valid


def _fetch(
    mesh: Mesh, buffer: Tensor, layout: Layout, dim: int, needs: tuple[Extent, ...], start: int, valid: list[Extent]
) -> None:
    """Exchange the missing rows of one dimension with the ranks that own them, and widen `valid`."""
    factor = require_axis(layout, dim)
    cut, me = factor.cut, mesh.part(factor.axis)
    outgoing, incoming = transfers(mesh, layout, dim, needs)
    sends = [
        (peer, _rows(buffer, dim, rows, start, valid).contiguous(memory_format=_CONTIGUOUS)) for peer, rows in outgoing
    ]
    receives, landings = [], []
    for peer, rows in incoming:
        target = _rows(buffer, dim, rows, start, valid)
        landing = target if target.is_contiguous() else torch.empty_like(target, memory_format=_CONTIGUOUS)
        receives.append((peer, landing))
        landings.append((target, landing))
    mesh.comm.exchange(sends, receives)
    for target, landing in landings:
        if target is not landing:
            target.copy_(landing)
    low, high = max(needs[me][0], 0) - start, min(needs[me][1], cut.size) - start
    valid[dim] = (min(valid[dim][0], low), max(valid[dim][1], high))


def _rows(buffer: Tensor, dim: int, rows: Extent, start: int, valid: list[Extent]) -> Tensor:
    region = list(valid)
    region[dim] = (rows[0] - start, rows[1] - start)
    return region_of(buffer, region)


# ---- a halo that is under way while the inside is being computed -----------------------------------------------------
#
# What is made here is a recipe. The kernel that uses it writes rows, halo and padding straight into the buffer that it
# needs anyway, in the dtype that it works in, and begins with the rows that need no halo.


@outside_modes
def _extend_later(
    mesh: Mesh,
    tensor: Tensor,
    layout: Layout,
    needs: Mapping[int, tuple[Extent, ...]],
    pads: Mapping[int, Extent],
    fill: Fill,
) -> Tensor | None:
    """As `extend`, computed by who uses it; the messages are on their way when this returns.

    Returns:
        None where that can't be: the padding is mirrored, rows of one side come from several ranks, or there is no
        kernel for such a tensor. The messages are the same either way, so ranks may differ in it.
    """
    if fill.mode == "reflect" or not fits(tensor):
        return None
    ((dim, need),) = needs.items()  # `extend` takes one after the other.
    factor = require_axis(layout, dim)
    me, size = mesh.part(factor.axis), factor.cut.size
    have, (low, high) = factor.cut.extents[me], need[me]
    kept = overlap(have, (low, high))
    sends, receives = transfers(mesh, layout, dim, need)
    before, after = ([t for t in receives if (t.rows[0] < have[0]) == first] for first in (True, False))
    if kept is None or max(len(before), len(after)) > 1:
        return None
    parts = parts_in(tensor)
    halo = _begin(mesh, parts, dim, have[0], sends, before, after)
    # A part that is whole stays the very tensor: it may have room around it.
    inside = parts if kept == have else tuple(part.narrow(dim, kept[0] - have[0], kept[1] - kept[0]) for part in parts)
    around = {**pads, dim: (max(0, -low), max(0, high - size))}
    joined = Joined(inside, halo=halo).padded(around, fill)
    assert joined is not None, "there is no other padding"
    return Deferred(joined)


def _begin(
    mesh: Mesh, parts: tuple[Tensor, ...], dim: int, start: int, sends: list[Transfer], before: list[Transfer],
    after: list[Transfer],
) -> Halo | None:  # fmt: skip
    """Post the messages."""
    if not (sends or before or after):
        return None
    outgoing = [(peer, _copied(parts, dim, low - start, high - low)) for peer, (low, high) in sends]
    shape = list(parts[0].shape)
    shape[2] = sum(part.shape[2] for part in parts) if dim != 2 else shape[2]
    incoming = [
        (peer, parts[0].new_empty([*shape[:dim], high - low, *shape[dim + 1 :]]))
        for peer, (low, high) in (*before, *after)
    ]
    pending = mesh.comm.post(outgoing, incoming)
    landed = [tensor for _, tensor in incoming]
    first, last = (landed.pop(0) if side else None for side in (before, after))
    return Halo(dim, first, last, pending.wait)


def _copied(parts: tuple[Tensor, ...], dim: int, low: int, count: int) -> Tensor:
    """Some rows in memory of their own: the network may write into its tensors while the message is under way."""
    rows = [part.narrow(dim, low, count) for part in parts]
    if len(rows) > 1:
        return torch.cat(rows, 2).contiguous(memory_format=_CONTIGUOUS)
    return rows[0].clone(memory_format=_CONTIGUOUS)
