"""Tensors joined along a dimension and padded, written once, into the buffer of the operator that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from halovae.geometry import Extent
from halovae.kernels import gpu
from halovae.kernels.borders import Fill, fill_outside
from halovae.kernels.formats import is_channels_last, memory_format


@dataclass(frozen=True)
class Joined:
    """`parts` one after the other along `dim`, with padding around; a recipe."""

    parts: tuple[Tensor, ...]
    dim: int = 2
    pads: Mapping[int, Extent] = field(default_factory=dict[int, Extent])
    """Positions to add before and after, by dimension."""
    fill: Fill = field(default_factory=Fill)

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The shape without padding."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

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
        return self.parts

    def padded(self, pads: Mapping[int, Extent], fill: Fill) -> Joined | None:
        """With padding around; None where there is other padding already."""
        pads = {dim: pad for dim, pad in pads.items() if pad != (0, 0)}
        if not pads:
            return self
        if not self.pads:
            return replace(self, pads=pads, fill=fill)
        if fill != self.fill or fill.mode != "constant":
            return None
        dims = {*pads, *self.pads}
        both = [[p.get(dim, (0, 0)) for p in (self.pads, pads)] for dim in dims]
        return replace(self, pads={d: (a[0] + b[0], a[1] + b[1]) for d, (a, b) in zip(dims, both, strict=True)})

    def compute(self) -> Tensor:
        if not self.pads:
            return torch.cat(self.parts, self.dim)
        return self.rows(0, self.shape[-2], self.dtype, self.channels_last)

    def settled(self) -> Tensor:
        """Channels-last; the only part itself where nothing is joined or padded."""
        if len(self.parts) == 1 and not self.pads:
            return self.parts[0].contiguous(memory_format=memory_format(len(self.shape), True))
        if not self.pads and (joined := gpu.joined(self.parts, self.dim)) is not None:
            return joined
        return self.rows(0, self.shape[-2], self.dtype, True)

    def rows(self, low: int, high: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
        """Padded rows from `low` to `high`, in one new tensor."""
        before = self.pads.get(len(self.shape) - 2, (0, 0))[0]
        height = self.inner[-2]
        shape = [*self.shape[:-2], high - low, self.shape[-1]]
        buffer = torch.empty(
            shape, dtype=dtype, device=self.device, memory_format=memory_format(len(shape), channels_last)
        )
        first, last = min(max(low - before, 0), height - 1), max(min(high - before, height), 1)
        valid = [(self.pads.get(dim, (0, 0))[0],) * 2 for dim in range(len(shape))]
        valid = [(start, start + size) for (start, _), size in zip(valid, self.inner, strict=True)]
        valid[-2] = (max(first + before - low, 0), min(last + before - low, high - low))
        inside = buffer
        for dim, (start, end) in enumerate(valid):
            inside = inside.narrow(dim, start, end - start)
        at = 0
        for part in self.parts:
            source = part.narrow(-2, first, last - first)
            target = inside if len(self.parts) == 1 else inside.narrow(self.dim, at, part.shape[self.dim])
            target.copy_(source)
            at += part.shape[self.dim]
        for dim in range(len(shape)):
            fill_outside(buffer, dim, valid, self.fill)
        return buffer
