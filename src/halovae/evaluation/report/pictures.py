"""Pictures for the page: frames, amplified differences and heat maps, as data in the page itself."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halovae.evaluation import ClipComparison, Frames
from halovae.evaluation.seams import Map

MOST_FRAMES = 24
"""Of one comparison that the page shows; more would make it slow to open."""
_WIDEST = 960
_QUALITY = 88
_HEAT = ((8, 8, 22), (62, 18, 92), (150, 34, 102), (223, 82, 60), (250, 164, 46), (252, 250, 190))
"""From no difference to the largest, each step brighter than the one before, so that it reads without colour too."""


@dataclass(frozen=True, kw_only=True)
class Triple:
    """One frame on the page; pictures are data URIs."""

    frame: int
    reference: str
    result: str
    difference: str
    words: str
    """Its numbers."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Where the difference is, over all frames."""

    picture: str
    height: int
    width: int
    largest: float
    """Levels that the brightest colour stands for."""


def triples(reference: Frames, result: Frames, found: ClipComparison) -> list[Triple]:
    """The frames to show, the worst one among them."""
    factor = gain(reference, result)
    shown = chosen(len(found.frames), found.worst)
    return [
        Triple(
            frame=number,
            reference=_uri(one),
            result=_uri(other),
            difference=_uri(np.abs(_gap(one, other)) * factor),
            words=_words(found, number),
        )
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


def heat_map(energy: Map) -> HeatMap:
    """The root of the mean squared difference of each position, as colours."""
    levels = np.sqrt(energy)
    largest = float(np.quantile(levels, 0.999)) or float(levels.max())
    shares = np.clip(levels / largest, 0, 1) if largest else levels
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(shares, stops, [colour[i] for colour in _HEAT]) for i in range(3)], axis=2)
    return HeatMap(picture=_uri(colours), height=energy.shape[0], width=energy.shape[1], largest=largest)


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
    parts = ["identical" if math.isinf(scores.psnr) else f"PSNR {scores.psnr:.2f} dB"]
    if scores.ssim is not None:
        parts.append(f"SSIM {scores.ssim:.4f}")
    parts.append(f"largest difference {scores.largest:.3g} of 255")
    return ", ".join(parts)
