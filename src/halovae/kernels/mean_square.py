"""The root mean square over channels, as networks write it out: squares, their mean, a small number, a root.

Each of these waits for the next one, and the division by the root becomes one step of a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halovae.kernels.lazy.chain import Chain
from halovae.kernels.memory_format import memory_of


@dataclass(frozen=True)
class MeanSquare:
    """Something on the way from a tensor to its root mean square; a recipe."""

    chain: Chain
    """What is squared."""
    dtype: torch.dtype
    dim: int | None = None
    """The mean over it is taken; None: not yet."""
    added: float = 0.0
    power: float = 1.0
    """1: the mean square; 0.5: its root; -0.5: one over the root."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(1 if dim == self.dim else size for dim, size in enumerate(self.chain.shape))

    @property
    def device(self) -> torch.device:
        return self.chain.device

    @property
    def channels_last(self) -> bool:
        return self.dim is None and self.chain.channels_last

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.chain.sources

    @property
    def is_root(self) -> bool:
        return self.power != 1.0

    def is_of(self, chain: Chain) -> bool:
        """Whether it is the root mean square of the very tensor that a chain makes."""
        return chain.steps is self.chain.steps and _is_same(chain.base, self.chain.base)

    def compute(self) -> Tensor:
        base = self.chain.cast(self.dtype).compute() if self.chain.steps else self.chain.base.to(self.dtype)
        value = base.square()
        if self.dim is None:
            return value
        value = value.mean(self.dim, keepdim=True)
        if self.added:
            value = value + self.added
        return value if self.power == 1.0 else value.sqrt() if self.power == 0.5 else value.rsqrt()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        memory_of(one) == memory_of(other)
        and (one.dtype, one.shape, one.stride(), one.storage_offset())
        == (other.dtype, other.shape, other.stride(), other.storage_offset())
    )
