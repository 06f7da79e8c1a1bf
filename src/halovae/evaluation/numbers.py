"""Means of what is known, and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are; None where there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def finite(value: float | None) -> float | None:
    """JSON has no infinity, and nothing for what is no number: null stands for them."""
    return None if value is None or not math.isfinite(value) else value


def bound(value: float) -> str:
    """The smallest number of one digit that is larger: 0.000336 is less than 0.0004."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** math.floor(math.log10(abs(value)))
    return f"{(math.floor(value / unit) + 1) * unit:.1g}".replace("e-0", "e-")


def decibel(value: float) -> str:
    """A PSNR in words."""
    return "identical" if math.isinf(value) else f"{value:.2f} dB"
