"""Cutting work into pieces that stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod

from torch import Tensor

CHAIN_ELEMENTS = 1 << 17
"""Elements of a piece of a chain, per thread: half a megabyte in float32, a quarter of the usual second-level cache."""

WINDOW_BYTES = 1 << 23
"""Bytes of a piece of a convolution's input, per thread: small beside the picture, large beside the rows it shares."""

Piece = tuple[tuple[int, int, int], ...]
"""(dimension, first position, number of positions) of each cut dimension."""


def pieces(shape: tuple[int, ...], uncut: Collection[int], elements: int) -> Iterator[Piece]:
    """Cut the outermost dimensions that may be cut until a piece has at most `elements`, as far as possible."""
    total = prod(shape)
    dim = next((d for d in range(len(shape)) if d not in uncut and shape[d] > 1), None)
    if total <= elements or dim is None:
        yield ()
        return
    step = max(1, elements * shape[dim] // total)
    for low in range(0, shape[dim], step):
        count = min(step, shape[dim] - low)
        rest = (*shape[:dim], count, *shape[dim + 1 :])
        for inner in pieces(rest, {*uncut, dim}, elements):
            yield ((dim, low, count), *inner)


def size_of(piece: Piece) -> tuple[int, ...]:
    """Positions along each cut dimension."""
    return tuple(count for _, _, count in piece)


def cut_out(tensor: Tensor, piece: Piece) -> Tensor:
    """The view of a tensor that is this piece."""
    for dim, low, count in piece:
        tensor = tensor.narrow(dim, low, count)
    return tensor
