"""Pixels that become channels by hand, and the means of groups of these; a sum of two such is one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from halovae.kernels.gpu import copies
from halovae.kernels.lazy.chain import Chain, Seen
from halovae.kernels.lazy.deferred import plain, recipe_of
from halovae.kernels.lazy.joined import Joined
from halovae.kernels.memory_format import is_channels_last, memory_format, strides_of
from halovae.kernels.precision import LOW


@dataclass(frozen=True)
class Shuffled:
    """`[B, C, p, q, r, T, H, W]` as `[B, C * p * q * r, T, H, W]`; a recipe, on accelerators."""

    source: Tensor | Seen
    group: int | None = None
    """Channels that follow each other and are a dimension of their own, after that of the channels."""
    averaged: bool = False
    """Whether their mean is taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        batch, *pixels = self.source.shape[:5]
        channels, sizes = prod(pixels), self.source.shape[5:]
        if self.group is None:
            return batch, channels, *sizes
        return (batch, channels // self.group, *(() if self.averaged else (self.group,)), *sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def channels_last(self) -> bool:
        return len(self.shape) == 5

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.source.sources if isinstance(self.source, Seen) else (self.source,)

    def grouped(self, shape: Sequence[int]) -> Shuffled | None:
        """Seen as `[B, groups, channels of each, T, H, W]`; None where that is another shape."""
        batch, channels, *sizes = self.shape
        if self.group is not None or len(shape) != 6 or (batch, *sizes) != (shape[0], *shape[3:]):
            return None
        return replace(self, group=shape[2]) if shape[1] * shape[2] == channels else None

    def mean(self, dim: int) -> Shuffled | None:
        """Over the channels of each group; None over anything else."""
        return replace(self, averaged=True) if self.group is not None and not self.averaged and dim == 2 else None

    def compute(self) -> Tensor:
        if self.averaged and (found := _gathered((self,))) is not None:
            return found
        source = self.source.compute() if isinstance(self.source, Seen) else self.source
        batch, *pixels = source.shape[:5]
        out = torch.empty((batch, *source.shape[5:], prod(pixels)), dtype=self.dtype, device=self.device)
        copies.shuffle(out.movedim(-1, 1).unflatten(1, pixels), source)
        out = out.movedim(-1, 1)
        if self.group is None:
            return out
        out = out.unflatten(1, (-1, self.group))
        return out.mean(2) if self.averaged else out


def shuffled(tensor: Tensor, shape: Sequence[int]) -> Shuffled | None:
    """`tensor.reshape(shape)`, if that makes channels of pixels of channels-last videos; else None."""
    if tensor.ndim != 8 or len(shape) != 5 or tuple(shape) != (
        len(tensor), prod(tensor.shape[1:5]), *tensor.shape[5:]
    ):  # fmt: skip
        return None
    recipe = recipe_of(tensor)
    source = recipe if isinstance(recipe, Seen) else plain(tensor)
    stride = source.example.stride() if isinstance(source, Seen) else source.stride()
    return Shuffled(source) if stride[1] == 1 and source.shape[1] > 1 else None


def summed(one: Any, other: Any) -> Tensor | None:
    """The sum of two such tensors in one pass; None where they are something else."""
    parts = recipe_of(one), recipe_of(other)
    if not all(isinstance(part, Shuffled) and len(part.shape) == 5 for part in parts):
        return None
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return None
    return _gathered(parts)  # pyright: ignore[reportArgumentType]


def _gathered(parts: Sequence[Shuffled]) -> Tensor | None:
    """The sum of one or two; None where the kernel doesn't take them."""
    terms = [term for part in parts if (term := _term(part)) is not None]
    if len(terms) < len(parts) or parts[0].dtype not in (torch.float32, *LOW):
        return None
    return copies.sum_of_shuffled(parts[0].shape, parts[0].dtype, terms)


def _term(part: Shuffled) -> copies.Term | None:
    """How the kernel reads it; None where it can't."""
    source, group = part.source, part.group or 1
    if isinstance(source, Tensor):
        return copies.Term(source, source.stride(), source.shape, group)
    base, before, shift = source.chain, None, None
    if isinstance(base, Joined):
        parts = list(base.parts)
        if not base.is_bare or base.dim != 2 or len(parts) > 2:
            return None
        base = parts.pop()
        before = parts.pop() if parts else None
    elif isinstance(base, Chain):
        if base.dtype != base.base.dtype or [step.kind for step in base.steps] not in ([], ["plus"]):
            return None
        shift = base.steps[0].value if base.steps else None
        base = base.base.contiguous(memory_format=memory_format(base.base.ndim, True))
    if not isinstance(base, Tensor) or not is_channels_last(base) or not _are_blocks(source):
        return None
    return copies.Term(base, _steps(base.stride(), source.shape), source.shape, group, shift, before)


def _are_blocks(seen: Seen) -> bool:
    """Whether the views put the pixels of a block behind its channel."""
    batch, channels, p, q, r, time, height, width = seen.shape
    whole = batch, channels, time * p, height * q, width * r
    steps = zip(seen.example.stride(), _steps(strides_of(whole, True), seen.shape), seen.shape, strict=True)
    return seen.chain.shape == whole and all(given == wanted or size == 1 for given, wanted, size in steps)


def _steps(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Of blocks of a video, from its own."""
    inner = stride[2:]
    return *stride[:2], *inner, *(step * size for step, size in zip(inner, shape[2:5], strict=True))
