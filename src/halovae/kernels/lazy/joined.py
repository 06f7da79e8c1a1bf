"""Tensors joined along a dimension and padded, written once, into the buffer of the operator that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from halovae.base.geometry import Extent
from halovae.kernels.fill import Fill, fill_outside, region_of
from halovae.kernels.gpu import copies, room_around
from halovae.kernels.lazy.deferred import plain, recipe_of
from halovae.kernels.lazy.promise import kept
from halovae.kernels.memory_format import is_channels_last, memory_format


@dataclass(frozen=True)
class Halo:
    """What lies before and after the parts along a dimension of height or width, and is under way from elsewhere."""

    dim: int
    before: Tensor | None
    after: Tensor | None
    wait: Callable[[], None]
    """Returns when both are there; may be called again."""

    @property
    def lengths(self) -> Extent:
        before, after = (0 if edge is None else edge.shape[self.dim] for edge in (self.before, self.after))
        return before, after


@dataclass(frozen=True)
class Joined:
    """`parts` one after the other along `dim`, with a halo and padding around; a recipe."""

    parts: tuple[Tensor, ...]
    dim: int = 2
    pads: Mapping[int, Extent] = field(default_factory=dict[int, Extent])
    """Positions to add before and after, by dimension."""
    fill: Fill = field(default_factory=Fill)
    """Of these."""
    beyond: Mapping[int, Fill] = field(default_factory=dict[int, Fill])
    """Of dimensions that have another one: a value around mirrored pictures."""
    halo: Halo | None = None

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The shape without padding."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        if self.halo:
            shape[self.halo.dim] += sum(self.halo.lengths)
        return tuple(shape)

    @property
    def is_bare(self) -> bool:
        """Whether it has neither halo nor padding."""
        return not self.pads and not self.halo

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return tuple(size + sum(self.pads.get(dim, (0, 0))) for dim, size in enumerate(self.inner))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def channels_last(self) -> bool:
        return all(is_channels_last(part) for part in self.parts)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return tuple(value for part in self.parts if (value := kept(part)) is not None)

    def padded(self, pads: Mapping[int, Extent], fill: Fill) -> Joined | None:
        """With padding around; None where there is other padding already."""
        pads = {dim: pad for dim, pad in pads.items() if pad != (0, 0)}
        if not pads:
            return self
        if not self.pads:
            return replace(self, pads=pads, fill=fill)
        if fill.mode == "constant" and self.fill.mode == "reflect" and not pads.keys() & self.pads.keys():
            return replace(self, pads={**self.pads, **pads}, beyond={**self.beyond, **dict.fromkeys(pads, fill)})
        if fill != self.fill or fill.mode != "constant":
            return None
        dims = {*pads, *self.pads}
        both = [[p.get(dim, (0, 0)) for p in (self.pads, pads)] for dim in dims]
        return replace(self, pads={d: (a[0] + b[0], a[1] + b[1]) for d, (a, b) in zip(dims, both, strict=True)})

    def frames(self, start: int, stop: int, step: int) -> Joined | None:
        """Some of what is joined in time; None where they are not there yet, or more than joined."""
        if not self.is_bare or self.dim != 2 or step != 1 or start >= stop or len(self.sources) < len(self.parts):
            return None
        found: list[Tensor] = []
        for part in self.parts:
            low, high = max(start, 0), min(stop, part.shape[2])
            if low < high:
                found.append(part if high - low == part.shape[2] else plain(part).narrow(2, low, high - low))
            start, stop = start - part.shape[2], stop - part.shape[2]
        return Joined(tuple(found))

    def compute(self) -> Tensor:
        if self.is_bare:
            return torch.cat(self.parts, self.dim)
        return self.slab(-2, (0, self.shape[-2]), self.dtype, self.channels_last)

    def settled(self) -> Tensor:
        """Channels-last; the only part itself where nothing is joined or padded."""
        if len(self.parts) == 1 and self.is_bare:
            return self.parts[0].contiguous(memory_format=memory_format(len(self.shape), True))
        joined = self._in_room() if self.dim == 2 else None
        return self.slab(-2, (0, self.shape[-2]), self.dtype, True) if joined is None else joined

    def _in_room(self) -> Tensor | None:
        """In the memory around the longest part, where whoever made that has left enough."""
        lengths, valid = [part.shape[2] for part in self.parts], self._inside()
        # Of two, the first is what a network has kept of earlier frames. Of equal ones, some are repeated.
        sizes = [(length, hasattr(part, "room")) for length, part in zip(lengths, self.parts, strict=True)]
        place = 1 if len(lengths) == 2 else sizes.index(max(sizes))
        main, starts = list(self._blocks())[place]
        starts = [start + low for start, (low, _) in zip(starts, valid, strict=True)]
        if (room := room_around.room_of(main, starts, self.shape)) is None:
            return None
        self._copy(region_of(room, valid), 2, 0, self.inner[2], but=main)
        self._fill(room, valid)
        return room

    def slab(self, dim: int, extent: Extent, dtype: torch.dtype, channels_last: bool) -> Tensor:
        """Padded rows or columns (`dim`) of an extent, in one new tensor."""
        (low, high), dim = extent, dim % len(self.shape)
        before, size = self.pads.get(dim, (0, 0))[0], self.inner[dim]
        shape = list(self.shape)
        shape[dim] = high - low
        buffer = torch.empty(
            shape, dtype=dtype, device=self.device, memory_format=memory_format(len(shape), channels_last)
        )
        first, last = min(max(low - before, 0), size - 1), max(min(high - before, size), 1)
        valid = self._inside()
        valid[dim] = (max(first + before - low, 0), min(last + before - low, high - low))
        self._copy(region_of(buffer, valid), dim, first, last)
        self._fill(buffer, valid)
        return buffer

    def _inside(self) -> list[Extent]:
        """Where in the whole the unpadded is, along each dimension."""
        before = (self.pads.get(dim, (0, 0))[0] for dim in range(len(self.shape)))
        return [(start, start + size) for start, size in zip(before, self.inner, strict=True)]

    def _fill(self, buffer: Tensor, valid: list[Extent]) -> None:
        """Write the padding."""
        fills = {dim: self.beyond.get(dim, self.fill) for dim in sorted(self.pads)}
        if copies.fill(buffer, valid, fills):
            return
        for dim, fill in fills.items():
            fill_outside(buffer, dim, valid, fill)

    def _copy(self, inside: Tensor, dim: int, first: int, last: int, but: Tensor | None = None) -> None:
        """Write what is unpadded from `first` to `last`; wait for the halo only where some of that is in it.

        Args:
            dim: along which `first` and `last` are meant; the last one is not written any more.
            but: a part that is there already.
        """
        for block, starts in self._blocks():
            if block is but:
                continue
            low, high = max(first, starts[dim]), min(last, starts[dim] + block.shape[dim])
            if low >= high:
                continue
            if self.halo and any(block is edge for edge in (self.halo.before, self.halo.after)):
                self.halo.wait()
            region = [(start, start + size) for start, size in zip(starts, block.shape, strict=True)]
            region[dim] = (low - first, high - first)
            copies.copy(region_of(inside, region), block.narrow(dim, low - starts[dim], high - low))

    def _blocks(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Each tensor it is made of, and where that begins in the unpadded whole; those that are here first."""
        halo, starts = self.halo, [0] * len(self.shape)
        if halo:
            starts[halo.dim] = halo.lengths[0]
        for part in self.parts:
            yield part, list(starts)
            starts[self.dim] += part.shape[self.dim]
        if not halo:
            return
        ends = 0, self.inner[halo.dim] - halo.lengths[1]
        for edge, start in zip((halo.before, halo.after), ends, strict=True):
            if edge is not None:
                yield edge, [start if dim == halo.dim else 0 for dim in range(len(self.shape))]


def joined_in(tensor: Tensor) -> Joined:
    """The join that waits in a tensor, else one of the tensor alone."""
    recipe = recipe_of(tensor)
    return recipe if isinstance(recipe, Joined) and recipe.dim >= 2 else Joined((to_join(tensor),))


def to_join(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own; with room around, if it is to be made now by a kernel that leaves some."""
    with room_around.leaving_room():
        return plain(tensor)


def parts_in(tensor: Tensor) -> tuple[Tensor, ...]:
    """What is joined in time, without anything around it, in a tensor that waits for that; else the tensor."""
    if kept(tensor) is None:
        return (tensor,)
    recipe = recipe_of(tensor)
    return recipe.parts if isinstance(recipe, Joined) and recipe.is_bare and recipe.dim == 2 else (to_join(tensor),)


def copy_of(tensor: Tensor) -> Joined:
    """A recipe for a copy, for results that equal their argument: whoever only reads does without."""
    return Joined((plain(read(tensor)),))


def read(value: Any) -> Any:
    """What to read in place of an argument: of a copy that waits, the original."""
    recipe = recipe_of(value)
    return recipe.parts[0] if isinstance(recipe, Joined) and recipe.is_bare and len(recipe.parts) == 1 else value
