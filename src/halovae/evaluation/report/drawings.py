"""What the page draws: frames, amplified differences and heat maps as data in the page itself; curves as points."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halovae.evaluation import ClipComparison, Frames, LatentComparison
from halovae.evaluation.scores import decibel
from halovae.evaluation.seams import Map

MOST_FRAMES = 24
"""Of one comparison that the page shows; more would make it slow to open."""
_WIDEST = 960
_QUALITY = 88
_HEAT = ((8, 8, 22), (62, 18, 92), (150, 34, 102), (223, 82, 60), (250, 164, 46), (252, 250, 190))
"""From no difference to the largest, each step brighter than the one before, so that it reads without colour too."""


Drawn = dict[str, Any]
"""What the template of the page reads by name."""


def triples(reference: Frames, result: Frames, found: ClipComparison) -> list[Drawn]:
    """The frames to show, the worst one among them: pictures as data URIs, and numbers in words."""
    factor = gain(reference, result)
    shown = chosen(len(found.frames), found.worst)
    return [
        {
            "frame": number,
            "reference": _uri(one),
            "result": _uri(other),
            "difference": _uri(np.abs(_gap(one, other)) * factor),
            "words": _words(found, number),
        }
        for number, (one, other) in enumerate(zip(reference, result, strict=True))
        if number in shown
    ]


def singles(frames: NDArray[Any]) -> list[tuple[int, str]]:
    """The frames to show of a clip without a reference: numbers and data URIs."""
    shown = chosen(len(frames), 0)
    return [(number, _uri(frame)) for number, frame in enumerate(frames) if number in shown]


def chosen(count: int, worst: int) -> list[int]:
    """Frames spread evenly from the first to the last, and the worst."""
    if count <= MOST_FRAMES:
        return list(range(count))
    spread = {round(step * (count - 1) / (MOST_FRAMES - 2)) for step in range(MOST_FRAMES - 1)}
    return sorted(spread | {worst})


def gain(reference: Frames, result: Frames) -> float:
    """A round number that makes all but the largest hundredth of the differences fit the range; at least 1."""
    large = max(float(np.quantile(np.abs(_gap(a, b)), 0.99)) for a, b in zip(reference, result, strict=True))
    if large == 0:
        return 1.0
    most = max(1.0, 255 / large)
    unit = 10.0 ** math.floor(math.log10(most))
    return max(unit * factor for factor in (1, 2, 5) if unit * factor <= most)


def heat_map(energy: Map) -> Drawn:
    """The root of the mean squared difference of each position, as colours; the brightest stands for the `largest`."""
    levels = np.sqrt(energy)
    largest = float(np.quantile(levels, 0.999)) or float(levels.max())
    shares = np.clip(levels / largest, 0, 1) if largest else levels
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(shares, stops, [colour[i] for colour in _HEAT]) for i in range(3)], axis=2)
    return {"picture": _uri(colours), "height": energy.shape[0], "width": energy.shape[1], "largest": largest}


def heat_scale() -> str:
    """The colours of heat maps from left to right, as CSS has them."""
    return ", ".join(f"rgb{colour}" for colour in _HEAT)


def _gap(reference: NDArray[Any], result: NDArray[Any]) -> NDArray[np.float32]:
    return result.astype(np.float32) - reference.astype(np.float32)


def _uri(pixels: NDArray[Any]) -> str:
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if picture.width > _WIDEST:
        height = max(1, round(picture.height * _WIDEST / picture.width))
        picture = picture.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="WebP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _words(found: ClipComparison, number: int) -> str:
    scores = found.frames[number]
    parts = [decibel(scores.psnr) if math.isinf(scores.psnr) else f"PSNR {decibel(scores.psnr)}"]
    if scores.ssim is not None:
        parts.append(f"SSIM {scores.ssim:.4f}")
    parts.append(f"largest difference {scores.largest:.3g} of 255")
    return ", ".join(parts)


# ---- curves: places are percentages of the plot, from its top left corner --------------------------------------------


Values = Sequence[float | None]
_FLAT = 1e-3
"""Values that differ by a smaller share than this are drawn as the same: their noise is of no account."""


def clip_curves(found: ClipComparison) -> list[Drawn]:
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


def latent_curves(found: LatentComparison) -> list[Drawn]:
    """Relative L2 of every latent frame."""
    values = [None if math.isinf(value) else value for value in found.frames]
    plot = curve("Relative L2", "", {"": values}, with_zero=True)
    return [] if plot is None else [plot]


def curve(title: str, unit: str, series: Mapping[str, Values], with_zero: bool = False) -> Drawn | None:
    """A plot of lines, by the name of their colour, over frames; None where nothing is to be seen: one frame, or no
    value. Its `ticks` are places from the top with their numbers, its `words` are for who can't see it."""
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
    return {
        "title": title, "unit": unit, "count": count,
        "lines": [_line(name, values, place) for name, values in series.items()],
        "ticks": [(round(place(n), 2), _label(n, digits)) for n in numbers],
        "words": f"{title} over {count} frames, from {min(known):.4g} to {max(known):.4g} {unit}".rstrip(),
    }  # fmt: skip


def _line(name: str, values: Values, place: Callable[[float], float]) -> Drawn:
    """Points as SVG has them, one piece from gap to gap; dots for values that have no neighbour."""
    step = 100 / (len(values) - 1)
    pieces: list[list[tuple[float, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((round(index * step, 3), round(place(value), 3)))
    joined = [" ".join(f"{x},{y}" for x, y in piece) for piece in pieces if len(piece) > 1]
    return {"name": name, "pieces": joined, "dots": [piece[0] for piece in pieces if len(piece) == 1]}


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
