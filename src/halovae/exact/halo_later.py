"""A halo that is under way while the inside is being computed.

`halo.extend` waits for the neighbours' rows and copies everything into one buffer. What is made here has the same
shape and is a recipe: the kernel that uses it writes rows, halo and padding straight into the buffer that it needs
anyway, in the dtype that it works in, and begins with the rows that need no halo.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halovae.base.functions import outside_modes
from halovae.base.geometry import Extent, overlap
from halovae.exact.layout import Layout, require_axis
from halovae.exact.mesh import Mesh, Transfer, transfers
from halovae.kernels.fast_rules import fits
from halovae.kernels.fill import Fill
from halovae.kernels.lazy.deferred import Deferred
from halovae.kernels.lazy.joined import Halo, Joined, parts_in


@outside_modes
def extend_later(
    mesh: Mesh,
    tensor: Tensor,
    layout: Layout,
    needs: Mapping[int, tuple[Extent, ...]],
    pads: Mapping[int, Extent],
    fill: Fill,
) -> Tensor | None:
    """As `halo.extend`, computed by who uses it; the messages are on their way when this returns.

    Returns:
        None where that can't be: the padding is mirrored, rows of one side come from several ranks, or there is no
        kernel for such a tensor. The messages are the same either way, so ranks may differ in it.
    """
    if fill.mode == "reflect" or not fits(tensor):
        return None
    ((dim, need),) = needs.items()  # `halo.extend` takes one after the other.
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
    incoming = [(peer, _empty(parts[0], shape, dim, high - low)) for peer, (low, high) in (*before, *after)]
    pending = mesh.comm.post(outgoing, incoming)
    landed = [tensor for _, tensor in incoming]
    first, last = (landed.pop(0) if side else None for side in (before, after))
    return Halo(dim, first, last, pending.wait)


def _copied(parts: tuple[Tensor, ...], dim: int, low: int, count: int) -> Tensor:
    """Some rows in memory of their own: the network may write into its tensors while the message is under way."""
    rows = [part.narrow(dim, low, count) for part in parts]
    if len(rows) > 1:
        return torch.cat(rows, 2).contiguous(memory_format=torch.contiguous_format)
    return rows[0].clone(memory_format=torch.contiguous_format)


def _empty(like: Tensor, shape: list[int], dim: int, count: int) -> Tensor:
    return torch.empty([*shape[:dim], count, *shape[dim + 1 :]], dtype=like.dtype, device=like.device)
