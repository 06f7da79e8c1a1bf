"""Frames that are all equal, of which a convolution over time has to compute one.

The condition of an image-to-video model is one picture and then blank frames. What the picture leaves in the causal
caches of a network's first layers is over after a few chunks; from then on they see equal frames.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halovae.kernels.lazy.joined import Joined
from halovae.kernels.memory_format import memory_format


def is_still(joined: Joined) -> bool:
    """Whether all frames of `[B, C, T, H, W]` are equal, padding among them. They are compared, to the last bit.

    Of shapes alone nobody knows, and they count as different.
    """
    first, last = joined.parts[0], joined.parts[-1]
    if first.is_meta or (joined.pads.get(2, (0, 0)) != (0, 0) and joined.fill.mode != "replicate"):
        return False
    row, column = first.shape[3] // 2, first.shape[4] // 2
    # Frames that differ mostly do so here, which is quick to see.
    if not torch.equal(first[:, :, 0, row, column], last[:, :, -1, row, column]):
        return False
    if not all(_is_repeated(part, first) for part in joined.parts):
        return False
    if joined.halo:
        joined.halo.wait()
    return all(_is_repeated(edge, edge) for edge in _edges(joined))


def with_frames(joined: Joined, count: int) -> Joined:
    """A still picture with `count` frames, without padding in time."""
    halo = joined.halo
    if halo:
        before, after = (edge if edge is None else _repeated(edge, count) for edge in (halo.before, halo.after))
        halo = replace(halo, before=before, after=after)
    pads = {dim: pad for dim, pad in joined.pads.items() if dim != 2}
    return replace(joined, parts=(_repeated(joined.parts[0], count),), halo=halo, pads=pads)


def copies(frame: Tensor, count: int) -> Tensor:
    """`count` times the frame of `[B, C, 1, H, W]`, in memory of their own, channels last."""
    return frame.expand(-1, -1, count, -1, -1).contiguous(memory_format=memory_format(5, True))


def _edges(joined: Joined) -> list[Tensor]:
    return [edge for edge in (joined.halo.before, joined.halo.after) if edge is not None] if joined.halo else []


def _is_repeated(tensor: Tensor, first: Tensor) -> bool:
    """Whether each frame equals the first frame of `first`."""
    return all(torch.equal(frame, first[:, :, 0]) for frame in tensor.unbind(2))


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """The first frame, `count` times, as a view."""
    return tensor[:, :, :1].expand(-1, -1, count, -1, -1)
