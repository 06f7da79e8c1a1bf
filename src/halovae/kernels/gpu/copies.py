"""Copies, borders, and pixels that become channels or come from them: kernels that move data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halovae.base.geometry import Extent
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import operators, support
from halovae.kernels.gpu.fused import by_channel, flat_positions
from halovae.kernels.memory_format import memory_format, memory_of
from halovae.kernels.precision import LOW

_MANY = 1 << 16
"""Elements from which a copy takes longer than it takes to ask for it."""

_LARGEST_BLOCK = 256
"""Pixels of a block, times channels whose mean is taken, that one tile holds."""


def copy(target: Tensor, source: Tensor) -> None:
    """As `target.copy_(source)`."""
    if not (support.supports(target.device) and _is_large_picture(target) and target.dtype == source.dtype):
        target.copy_(source)
        return
    from halovae.kernels.gpu import triton_copy

    for frames, out in zip(_frames(source), _frames(target), strict=True):
        if not (triton_copy.fits(frames) and triton_copy.fits(out)):
            out.copy_(frames)
        elif out.is_meta:
            operators.copy(frames.movedim(-1, 1), out.movedim(-1, 1))
        else:
            triton_copy.run(frames, out)


def fill(buffer: Tensor, valid: Sequence[Extent], fills: Mapping[int, Fill]) -> bool:
    """As `fill_outside` for each dimension, in one pass; False, and nothing done, where that is not for the kernel.

    Args:
        buffer: a picture or videos.
        valid: what is there, along each dimension.
        fills: what lies beyond it.
    """
    if not support.supports(buffer.device) or buffer.is_meta or {fill.mode for fill in fills.values()} <= {"constant"}:
        return False
    videos = _frames(buffer)
    known = buffer.ndim in (4, 5) and buffer.dtype in (torch.float32, *LOW) and min(fills) >= 2
    if not known or not support.are_many(buffer.numel(), _MANY) or not _has_whole_rows(videos):
        return False
    for dim, each in fills.items():
        low, high = valid[dim]
        if each.mode == "reflect" and max(low, buffer.shape[dim] - high) >= high - low:
            return False
    alone = [(0, len(buffer))] if buffer.ndim == 4 else []
    sides = [(valid[dim], fills.get(dim, Fill())) for dim in range(2, buffer.ndim)]
    from halovae.kernels.gpu import triton_copy

    triton_copy.run_fill(videos, [*((extent, Fill()) for extent in alone), *sides])
    return True


def shuffle(target: Tensor, source: Tensor) -> None:
    """As `target.copy_(source)`, of views whose pixels and channels have changed places."""
    found = None
    known = support.supports(target.device) and target.dtype == source.dtype and not target.is_meta
    if known and support.are_many(target.numel(), _MANY):
        from halovae.kernels.gpu import triton_copy

        found = triton_copy.shuffle_of(target.shape, source.stride(), target.stride())
        if found is not None:
            triton_copy.run_shuffle(source, target, found)
    if found is None:
        target.copy_(source)


class Term(NamedTuple):
    """What is read as blocks `[B, C, p, q, r, T, H, W]` of a channels-last video."""

    picture: Tensor
    """It begins where the blocks do, or behind the frames `before`."""
    steps: Sequence[int]
    """Elements from block to block, or pixel to pixel, along each dimension; 1 from channel to channel."""
    shape: Sequence[int]
    """Of the blocks."""
    group: int
    """Of so many channels that follow each other the mean is taken, once all pixels of a block are its channels."""
    shift: Any = None
    """Added to each channel before: a parameter in float32 that broadcasts along everything but channels, or None."""
    before: Tensor | None = None
    """Frames before the first one of the picture."""


def sum_of_shuffled(shape: Sequence[int], dtype: torch.dtype, terms: Sequence[Term]) -> Tensor | None:
    """The sum of one or two terms in float32, rounded once; None where that is not for the kernel.

    Args:
        shape: `[B, C', T, H, W]`, of each term once its pixels are channels and means are taken.
        dtype: of the result.
        terms: in the same dtype.
    """
    shifts = [by_channel(term.shift, term.picture) if isinstance(term.shift, Tensor) else None for term in terms]
    for term, shift in zip(terms, shifts, strict=True):
        if not _fits(term) or (term.shift is not None and (shift is None or shift.ndim > 1)):
            return None
    terms = [Term(*term[:4], shift, term.before) for term, shift in zip(terms, shifts, strict=True)]
    out = torch.empty(
        tuple(shape), dtype=dtype, device=terms[0].picture.device, memory_format=memory_format(5, channels_last=True)
    )
    if out.is_meta:  # One pass over as much: the larger side of a mean is left out.
        operators.chain(flat_positions(out), flat_positions(out), other=flat_positions(out) if len(terms) > 1 else None)
        return out
    from halovae.kernels.gpu import triton_shuffled

    triton_shuffled.run(terms, out)
    return out


def _fits(term: Term) -> bool:
    """Whether blocks and groups divide a tile evenly, and whatever comes before is of the same memory."""
    sizes = *term.shape[2:5], term.group
    before, picture = term.before, term.picture
    together = before is None or (
        memory_of(before) == memory_of(picture) and (before.stride(), before.dtype) == (picture.stride(), picture.dtype)
    )
    powers = all(size & (size - 1) == 0 for size in sizes)
    return together and powers and prod(sizes) <= _LARGEST_BLOCK and term.steps[1] == 1


def _frames(picture: Tensor) -> Tensor:
    """A batch of pictures as `[1, T, H, W, C]`, or videos as `[B, T, H, W, C]`."""
    last = picture.movedim(1, -1)
    return last[None] if picture.ndim == 4 else last


def _has_whole_rows(videos: Tensor) -> bool:
    """Whether each row of `[B, T, H, W, C]` is one stretch of memory."""
    return videos.stride(4) == 1 and videos.stride(3) == videos.shape[4]


def _is_large_picture(tensor: Tensor) -> bool:
    return support.are_many(tensor.numel(), _MANY) and tensor.ndim in (4, 5)
