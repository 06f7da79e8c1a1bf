"""One frame against its reference, and its numbers in words and for JSON.

SSIM is that of Wang et al. 2004, MS-SSIM that of Wang et al. 2003: Gaussian windows of 11 x 11 (standard deviation 1.5)
that lie whole in the picture, K1 = 0.01, K2 = 0.03, the mean over windows and over red, green and blue, in double
precision: in single precision even places lose all digits of their variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Frame = NDArray[Any]
"""(height, width, 3) of levels from 0 to 255."""

PEAK = 255.0
OFF = 0.01 * PEAK
"""Levels from which a pixel counts as off."""
_WINDOW = 11
"""A frame has to be at least as large."""
_SIGMA = 1.5
_K1, _K2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM, from the full size to a sixteenth of it."""
_SMALLEST_MS_SSIM = _WINDOW * 2 ** (len(_SCALES) - 1)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How far a frame, or a clip, is from its reference; of a clip the means over its frames, but for two."""

    ssim: float | None
    """Structural similarity, 1 for equal frames; None where a frame is smaller than its window."""
    ms_ssim: float | None
    """The same over five scales; None where a frame is too small for them."""
    psnr: float
    """Peak signal-to-noise ratio in dB, infinite for equal frames; of a clip that of the mean squared error of all
    frames, as ffmpeg's filter has it."""
    largest: float
    """Largest difference, in levels of 255; of a clip the largest of all frames."""
    mean: float
    """Mean absolute difference, in levels."""
    share_off: float
    """Share of pixels of which a channel is off by more than 1% of the range."""
    colour_shift: tuple[float, float, float]
    """Mean of result - reference in red, green and blue, in levels."""
    flicker: float | None
    """Mean absolute change of the difference since the frame before, in levels; None for the first, and for one."""


@dataclass(frozen=True, kw_only=True)
class FrameScores(Scores):
    """How far one frame is from its reference."""

    frame: int
    """Counted from 0."""


def score_frame(reference: Frame, result: Frame, number: int = 0, before: Frame | None = None) -> FrameScores:
    """Score one frame; `before` is result - reference of the frame before, for flicker."""
    a, b = as_floats(reference), as_floats(result)
    gap = b - a
    size = np.abs(gap)
    red, green, blue = (float(mean) for mean in gap.mean(axis=(0, 1), dtype=np.float64))
    ssim, ms_ssim = _similarity(a, b)
    return FrameScores(
        frame=number,
        ssim=ssim,
        ms_ssim=ms_ssim,
        psnr=psnr([a], [b]),
        largest=float(size.max()),
        mean=float(size.mean(dtype=np.float64)),
        share_off=float((size.max(axis=2) > OFF).mean()),
        colour_shift=(red, green, blue),
        flicker=None if before is None else float(np.abs(gap - before).mean(dtype=np.float64)),
    )


class SquaredErrors:
    """Of frames that come one by one."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, reference: Frame, result: Frame) -> None:
        self._sum += float(np.square(as_floats(reference) - as_floats(result)).mean(dtype=np.float64))
        self._count += 1

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB over all frames together; infinite when they are equal."""
        return 10 * math.log10(PEAK**2 * self._count / self._sum) if self._sum else math.inf


def psnr(reference: Iterable[Frame], result: Iterable[Frame]) -> float:
    """As by `SquaredErrors`."""
    errors = SquaredErrors()
    # Frame by frame: the differences of a long clip take four times its memory.
    for one, other in zip(reference, result, strict=True):
        errors.add(one, other)
    return errors.psnr


def as_floats(frame: Frame) -> NDArray[np.float32]:
    return frame.astype(np.float32)


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[float | None, float | None]:
    """SSIM and MS-SSIM."""
    smallest = min(a.shape[:2])
    if smallest < _WINDOW:
        return None, None
    one, other = _planes(a), _planes(b)
    ssim, structure = _ssim(one, other)
    if smallest < _SMALLEST_MS_SSIM:
        return ssim, None
    product = 1.0
    for number, exponent in enumerate(_SCALES):
        if number:
            one, other = functional.avg_pool2d(one, 2), functional.avg_pool2d(other, 2)
            whole, structure = _ssim(one, other)
        else:
            whole = ssim
        # Luminance counts at the coarsest scale alone. Contrary structures have no root: they count as nothing alike.
        product *= max(0.0, whole if number == len(_SCALES) - 1 else structure) ** exponent
    return ssim, product


def _ssim(a: Tensor, b: Tensor) -> tuple[float, float]:
    """SSIM, and its factor of contrast and structure alone, of (channels, height, width)."""
    mean_a, mean_b = _windows(a), _windows(b)
    variance = _windows(a * a) - mean_a**2 + _windows(b * b) - mean_b**2
    structure = (2 * (_windows(a * b) - mean_a * mean_b) + _K2) / (variance + _K2)
    luminance = (2 * mean_a * mean_b + _K1) / (mean_a**2 + mean_b**2 + _K1)
    return float((luminance * structure).mean()), float(structure.mean())


def _windows(values: Tensor) -> Tensor:
    """The weighted mean of each window."""
    # One shift after the other: torch's convolution in double precision takes twenty times as long.
    for dim in (1, 2):
        size = values.shape[dim] - _WINDOW + 1
        mean = torch.zeros_like(values.narrow(dim, 0, size))
        for start, weight in enumerate(_WEIGHTS):
            mean.add_(values.narrow(dim, start, size), alpha=weight)
        values = mean
    return values


_BELL = [math.exp(-(((index - _WINDOW // 2) / _SIGMA) ** 2) / 2) for index in range(_WINDOW)]
_WEIGHTS = [height / sum(_BELL) for height in _BELL]


def _planes(frame: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float64))


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
