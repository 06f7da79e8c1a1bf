"""Filling the border of a buffer from its inside, or with a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import Extent


@dataclass(frozen=True)
class Fill:
    """What lies beyond the picture: torch's pad mode ("constant", "replicate" or "reflect") and its value."""

    mode: str = "constant"
    value: float = 0.0


def region_of(buffer: Tensor, region: list[Extent]) -> Tensor:
    """The view of positions from low to high along each dimension."""
    for dim, (size, (low, high)) in enumerate(zip(buffer.shape, region, strict=True)):
        if high - low != size:
            buffer = buffer.narrow(dim, low, high - low)
    return buffer


def fill_outside(buffer: Tensor, dim: int, valid: list[Extent], fill: Fill) -> None:
    """Fill one dimension before and after its valid rows, and widen `valid`."""
    low, high = valid[dim]
    for rows, edge, step in (((0, low), low, 1), ((high, buffer.shape[dim]), high - 1, -1)):
        count = rows[1] - rows[0]
        if not count:
            continue
        target = region_of(buffer, [*valid[:dim], rows, *valid[dim + 1 :]])
        if fill.mode == "constant":
            target.fill_(fill.value)
        elif fill.mode == "replicate":
            target.copy_(region_of(buffer, [*valid[:dim], (edge, edge + 1), *valid[dim + 1 :]]).expand_as(target))
        elif fill.mode == "reflect" and high - low > count:
            mirrored = (edge + 1, edge + 1 + count) if step == 1 else (edge - count, edge)
            target.copy_(region_of(buffer, [*valid[:dim], mirrored, *valid[dim + 1 :]]).flip(dim))
        else:
            raise NotExactError(f"padding of {count} rows in mode {fill.mode!r} on a shard of {high - low} rows")
    valid[dim] = (0, buffer.shape[dim])
