"""Attention masks that a network writes row by row, made at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor


@dataclass
class RowPrefixes:
    """A square of minus infinities with zeros at the beginning of each row; a recipe."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    lengths: list[int] = field(default_factory=list[int])
    """How many zeros each row begins with."""

    def __post_init__(self) -> None:
        self.lengths = [0] * self.size

    @property
    def size(self) -> int:
        return self.shape[0]

    @property
    def channels_last(self) -> bool:
        return False

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return ()

    def compute(self) -> Tensor:
        """With as many passes as there are runs of equal rows."""
        mask = torch.full(self.shape, float("-inf"), dtype=self.dtype, device=self.device)
        row = 0
        for length, rows in groupby(self.lengths):
            end = row + len(list(rows))
            mask[row:end, :length] = 0
            row = end
        return mask
