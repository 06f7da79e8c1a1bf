"""Means of what is known, and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are; None where there is none."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def finite(value: float | None) -> float | None:
    """JSON has no infinity: null stands for it."""
    return None if value is None or math.isinf(value) else value


def decibel(value: float) -> str:
    """A PSNR in words."""
    return "identical" if math.isinf(value) else f"{value:.2f} dB"
