"""Curves over frames, as points that a template draws. Places are percentages of the plot, from its top left corner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from halovae.evaluation import ClipComparison, LatentComparison

Values = Sequence[float | None]
_FLAT = 1e-3
"""Values that differ by a smaller share than this are drawn as the same: their noise is of no account."""


@dataclass(frozen=True, kw_only=True)
class CurveLine:
    """One line of a plot; it has gaps where a value is missing."""

    name: str
    """Of its colour; empty for the only one."""
    pieces: tuple[str, ...]
    """Points as SVG has them, "x,y x,y"; one piece from gap to gap."""
    dots: tuple[tuple[float, float], ...]
    """Values that have no neighbour to be joined to."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One plot."""

    title: str
    unit: str
    lines: tuple[CurveLine, ...]
    ticks: tuple[tuple[float, str], ...]
    """Place from the top, and the number that stands there."""
    count: int
    """How many frames."""
    words: str
    """What the plot shows, for who can't see it."""


def clip_curves(found: ClipComparison) -> list[Curve]:
    """PSNR, SSIM, mean difference, flicker and colour shift of every frame."""
    frames = found.frames
    shifts = {name: [s.colour_shift[i] for s in frames] for i, name in enumerate(("red", "green", "blue"))}
    curves = [
        curve("PSNR", "dB", {"": [None if math.isinf(s.psnr) else s.psnr for s in frames]}),
        curve("SSIM", "", {"": [s.ssim for s in frames]}),
        curve("Mean difference", "levels", {"": [s.mean for s in frames]}, with_zero=True),
        curve("Flicker", "levels", {"": [s.flicker for s in frames]}, with_zero=True),
        curve("Colour shift", "levels", shifts, with_zero=True),
    ]
    return [plot for plot in curves if plot is not None]


def latent_curves(found: LatentComparison) -> list[Curve]:
    """Relative L2 of every latent frame."""
    values = [None if math.isinf(value) else value for value in found.frames]
    plot = curve("Relative L2", "", {"": values}, with_zero=True)
    return [] if plot is None else [plot]


def curve(title: str, unit: str, series: Mapping[str, Values], with_zero: bool = False) -> Curve | None:
    """A plot of lines over frames; None where nothing is to be seen: one frame, or no value.

    Args:
        series: lines by the name of their colour.
        with_zero: whether the axis has to show 0.
    """
    known = [value for values in series.values() for value in values if value is not None]
    count = max(map(len, series.values()))
    if count < 2 or not known:
        return None
    low, high = min(known + [0.0] * with_zero), max(known + [0.0] * with_zero)
    numbers = _ticks(low, high)
    bottom, top = min(low, numbers[0]), max(high, numbers[-1])

    def place(value: float) -> float:
        return 100 * (top - value) / (top - bottom)

    digits = max(0, -math.floor(math.log10(numbers[1] - numbers[0]) + 1e-9))
    return Curve(
        title=title,
        unit=unit,
        lines=tuple(_line(name, values, place) for name, values in series.items()),
        ticks=tuple((round(place(n), 2), _label(n, digits)) for n in numbers),
        count=count,
        words=f"{title} over {count} frames, from {min(known):.4g} to {max(known):.4g} {unit}".rstrip(),
    )


def _line(name: str, values: Values, place: Callable[[float], float]) -> CurveLine:
    step = 100 / (len(values) - 1)
    pieces: list[list[tuple[float, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((round(index * step, 3), round(place(value), 3)))
    joined = tuple(" ".join(f"{x},{y}" for x, y in piece) for piece in pieces if len(piece) > 1)
    return CurveLine(name=name, pieces=joined, dots=tuple(piece[0] for piece in pieces if len(piece) == 1))


def _label(number: float, digits: int) -> str:
    if digits < 5:
        return f"{number:.{digits}f}"
    return f"{number:.1e}" if number else "0"


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers over the range, at least from end to end of it."""
    least = _FLAT * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    rough = (high - low) / 3
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
