"""A clip against its reference: every frame, and what only shows over many frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halovae.evaluation.numbers import finite, mean_known
from halovae.evaluation.scores import FrameScores, as_floats, psnr, score_frame
from halovae.evaluation.seams import CutLines, Map, seam_energy

Frames = Iterable[NDArray[Any]]
"""(frames, height, width, 3) of levels from 0 to 255; can be gone through more than once."""


@dataclass(frozen=True, kw_only=True)
class ClipComparison:
    """How far a clip is from its reference."""

    frames: tuple[FrameScores, ...]
    psnr: float
    """In dB, of the mean squared error of all frames, as ffmpeg's filter has it; infinite for equal clips."""
    drift: float | None
    """Levels by which the mean difference grows from the first frame to the last, on the least-squares line; None for
    one frame."""
    energy: Map
    """(height, width): squared difference in levels², the mean over frames and channels."""
    grid: CutLines
    """The lines that seam energy was measured at, if any."""
    seam: float | None
    """Seam energy, see `seams.seam_energy`."""

    @property
    def is_identical(self) -> bool:
        """Whether no level of any frame differs."""
        return self.largest == 0

    @property
    def ssim(self) -> float | None:
        """Mean over the frames."""
        return mean_known([scores.ssim for scores in self.frames])

    @property
    def ms_ssim(self) -> float | None:
        """Mean over the frames."""
        return mean_known([scores.ms_ssim for scores in self.frames])

    @property
    def largest(self) -> float:
        """Of all frames, in levels."""
        return max(scores.largest for scores in self.frames)

    @property
    def mean(self) -> float:
        """Mean absolute difference in levels."""
        return fmean([scores.mean for scores in self.frames])

    @property
    def share_off(self) -> float:
        """Share of pixels off by more than 1%."""
        return fmean([scores.share_off for scores in self.frames])

    @property
    def flicker(self) -> float | None:
        """Mean absolute change of the difference from frame to frame, in levels; None for one frame."""
        return mean_known([scores.flicker for scores in self.frames])

    @property
    def colour_shift(self) -> tuple[float, float, float]:
        """Mean of result - reference in red, green and blue, in levels."""
        red, green, blue = (fmean([scores.colour_shift[i] for scores in self.frames]) for i in range(3))
        return red, green, blue

    @property
    def worst(self) -> int:
        """Index into `frames` of the one with the lowest PSNR."""
        return min(range(len(self.frames)), key=lambda index: self.frames[index].psnr)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where null stands for what is infinite."""
        return {
            "identical": self.is_identical,
            "psnr": finite(self.psnr),
            "ssim": self.ssim,
            "ms_ssim": self.ms_ssim,
            "largest": self.largest,
            "mean": self.mean,
            "share_off": self.share_off,
            "colour_shift": list(self.colour_shift),
            "drift": self.drift,
            "flicker": self.flicker,
            "seam_energy": finite(self.seam),
            "grid": self.grid.to_dict(),
            "worst_frame": self.frames[self.worst].frame,
            "frames": [{**asdict(scores), "psnr": finite(scores.psnr)} for scores in self.frames],
        }


def compare_clips(
    reference: Frames,
    result: Frames,
    grid: CutLines | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ClipComparison:
    """Score every frame.

    Args:
        reference: (frames, height, width, 3), levels of 0 to 255.
        result: likewise, of the same shape.
    """
    scores: list[FrameScores] = []
    energy, before = 0.0, None
    for number, (a, b) in enumerate(zip(reference, result, strict=True)):
        scores.append(score_frame(a, b, number, before))
        before = as_floats(b) - as_floats(a)
        energy = energy + np.square(before).mean(axis=2, dtype=np.float64)
        advance()
    assert isinstance(energy, np.ndarray), "a clip has at least one frame"
    energy = energy / len(scores)
    grid = (grid or CutLines()).inside((energy.shape[0], energy.shape[1]))
    return ClipComparison(
        frames=tuple(scores),
        psnr=psnr(reference, result),
        drift=_growth([one.mean for one in scores]),
        energy=energy,
        grid=grid,
        seam=seam_energy(energy, grid),
    )


def _growth(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    slope = np.polyfit(np.arange(len(values)), values, 1)[0]
    return float(slope * (len(values) - 1))
