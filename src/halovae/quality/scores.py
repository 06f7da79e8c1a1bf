"""One frame against its reference. SSIM and MS-SSIM are those of torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frame = NDArray[Any]
"""(height, width, 3) of levels from 0 to 255."""

PEAK = 255.0
OFF = 0.01 * PEAK
"""Levels from which a pixel counts as off."""
_WINDOW = 11
"""Side of the Gaussian window of SSIM (Wang et al. 2004); a frame has to be at least as large."""
_SMALLEST_MS_SSIM = _WINDOW * 2**4
"""MS-SSIM (Wang et al. 2003) halves the frame four times and needs a window in what is left."""


@dataclass(frozen=True, kw_only=True)
class FrameScores:
    """How far one frame is from its reference."""

    frame: int
    """Counted from 0."""
    ssim: float | None
    """Structural similarity, 1 for equal frames; None where the frame is smaller than its window."""
    ms_ssim: float | None
    """The same over five scales; None where the frame is too small for them."""
    psnr: float
    """Peak signal-to-noise ratio in dB; infinite for equal frames."""
    largest: float
    """Largest difference, in levels of 255."""
    mean: float
    """Mean absolute difference, in levels."""
    share_off: float
    """Share of pixels of which a channel is off by more than 1% of the range."""
    colour_shift: tuple[float, float, float]
    """Mean of result - reference in red, green and blue, in levels."""
    flicker: float | None
    """Mean absolute change of the difference since the frame before, in levels; None for the first."""


def score_frame(reference: Frame, result: Frame, number: int = 0, before: Frame | None = None) -> FrameScores:
    """Score one frame.

    Args:
        reference: (height, width, 3).
        result: likewise.
        number: of the frame.
        before: result - reference of the frame before, for flicker.
    """
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


def psnr(reference: Iterable[Frame], result: Iterable[Frame]) -> float:
    """Peak signal-to-noise ratio in dB over all frames together; infinite when they are equal."""
    # Frame by frame: the differences of a long clip take four times its memory.
    pairs = zip(reference, result, strict=True)
    errors = [float(np.square(as_floats(a) - as_floats(b)).mean(dtype=np.float64)) for a, b in pairs]
    return math.inf if not any(errors) else 10 * math.log10(PEAK**2 * len(errors) / sum(errors))


def as_floats(frame: Frame) -> NDArray[np.float32]:
    return frame.astype(np.float32)


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[float | None, float | None]:
    """SSIM and MS-SSIM, in single precision: good to 2e-4 in bright, even places, and several times as fast."""
    # Here because it takes a second, which commands that only need `psnr` shall not wait for.
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    smallest = min(a.shape[:2])
    pair = _batch(b), _batch(a)
    ssim = ms_ssim = None
    if smallest >= _WINDOW:
        ssim = _number(structural_similarity_index_measure(*pair, data_range=PEAK))
    if smallest >= _SMALLEST_MS_SSIM:
        ms_ssim = _number(multiscale_structural_similarity_index_measure(*pair, data_range=PEAK, normalize="relu"))
    return ssim, ms_ssim


def _batch(frame: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0)


def _number(value: Tensor | tuple[Tensor, Tensor]) -> float:
    assert isinstance(value, Tensor)
    return float(value)
