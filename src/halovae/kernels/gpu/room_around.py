"""Memory with room around what kernels make, so that it is joined and padded where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from halovae.kernels.kept import kept
from halovae.kernels.memory_format import memory_format

_is_to_be_joined: ContextVar[bool] = ContextVar("_is_to_be_joined", default=False)


@contextmanager
def leaving_room() -> Iterator[None]:
    """Within it, what is computed goes into a join. Elsewhere a network may view it in ways that gaps forbid."""
    token = _is_to_be_joined.set(True)
    try:
        yield
    finally:
        _is_to_be_joined.reset(token)


def with_room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, maker: str = "chain") -> Tensor:
    """An uninitialised channels-last tensor of this shape; for a join, with as much room as the last one took.

    Whether a sum goes into a join is not known when it is made: it has room only before and behind all of it.
    """
    around = kept().rooms.get((maker, tuple(shape)))
    has_gaps = around is not None and (len(shape) < 5 or shape[0] > 1 or any(map(any, around[3:])))
    if not _is_to_be_joined.get() and (has_gaps or maker == "chain"):
        around = None
    whole = shape if around is None else [size + sum(more) for size, more in zip(shape, around, strict=True)]
    last = memory_format(len(shape), True)
    out = room = torch.empty(tuple(whole), dtype=dtype, device=device, memory_format=last)
    for dim, (before, _) in enumerate(around or ()):
        out = out.narrow(dim, before, shape[dim])
    out.room, out.maker = None if around is None else room, maker  # type: ignore[attr-defined]
    return out


def room_of(part: Tensor, starts: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The memory around a part of a larger tensor, to join and pad the part there without copying it.

    To be used at once: who asks for it again writes over what is around the part.

    Args:
        part: what a chain or a sum has made, to have any.
        starts: where it begins in the larger tensor, along each dimension.
        shape: of the larger tensor.

    Returns:
        A tensor of that shape with the part in its place, the rest uninitialised; None where there is none. The next
        such part will have it.
    """
    if not hasattr(part, "room") or part.shape[:2] != tuple(shape[:2]):
        return None
    room: Tensor | None = part.room  # type: ignore[attr-defined]
    if room is not None and tuple(room.shape) == tuple(shape) and part.storage_offset() == _offset(room, starts):
        return room
    sizes = zip(starts, part.shape, shape, strict=True)
    maker: str = part.maker  # type: ignore[attr-defined]
    kept().rooms[maker, tuple(part.shape)] = tuple((start, whole - size - start) for start, size, whole in sizes)
    return None


def _offset(tensor: Tensor, place: Sequence[int]) -> int:
    return sum(start * step for start, step in zip(place, tensor.stride(), strict=True))
