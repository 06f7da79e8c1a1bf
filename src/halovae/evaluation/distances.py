"""How far a clip or latents are from their reference: over all, by frame and by channel; and gates on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae.base.errors import InputError
from halovae.evaluation.scores import FrameScores, Scores, as_floats, finite, mean_known, psnr, score_frame
from halovae.evaluation.seams import CutLines, Map, seam_energy

Frames = Iterable[NDArray[Any]]
"""(frames, height, width, 3) of levels from 0 to 255; can be gone through more than once."""


@dataclass(frozen=True, kw_only=True)
class ClipComparison(Scores):
    """How far a clip is from its reference."""

    frames: tuple[FrameScores, ...]
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
    def worst(self) -> int:
        """Index into `frames` of the one with the lowest PSNR."""
        return min(range(len(self.frames)), key=lambda index: self.frames[index].psnr)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where null stands for what is infinite."""
        names = ("ssim", "ms_ssim", "largest", "mean", "share_off", "drift", "flicker")
        return {
            "identical": self.is_identical,
            "psnr": finite(self.psnr),
            **{name: getattr(self, name) for name in names},
            "colour_shift": list(self.colour_shift),
            "seam_energy": finite(self.seam),
            "grid": self.grid.to_dict(),
            "worst_frame": self.frames[self.worst].frame,
            "frames": [{"frame": one.frame, **asdict(one), "psnr": finite(one.psnr)} for one in self.frames],
        }


def compare_clips(
    reference: Frames,
    result: Frames,
    grid: CutLines | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ClipComparison:
    """Score every frame of two clips of one shape."""
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
    means: dict[str, Any] = {
        name: mean_known([getattr(one, name) for one in scores])
        for name in ("ssim", "ms_ssim", "mean", "share_off", "flicker")
    }
    red, green, blue = (fmean(shifts) for shifts in zip(*(one.colour_shift for one in scores), strict=True))
    return ClipComparison(
        **means,
        frames=tuple(scores),
        psnr=psnr(reference, result),
        largest=max(one.largest for one in scores),
        colour_shift=(red, green, blue),
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


# ---- latents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChannelScores:
    """How far one channel of the latents is from its reference."""

    channel: int
    relative_l2: float
    """L2 norm of the difference over that of the reference channel."""
    largest: float
    """Largest absolute difference."""
    shift: float
    """Mean of result - reference."""


@dataclass(frozen=True, kw_only=True)
class LatentComparison:
    """How far latents are from their reference."""

    relative_l2: float
    """L2 norm of the difference over that of the reference; infinite for a reference of zeros."""
    largest: float
    """Largest absolute difference."""
    largest_relative: float
    """The same as a share of the largest reference latent."""
    channels: tuple[ChannelScores, ...]
    frames: tuple[float, ...]
    """Relative L2 of each latent frame."""

    @property
    def worst(self) -> int:
        """The frame with the largest relative L2."""
        return max(range(len(self.frames)), key=lambda index: self.frames[index])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where null stands for what is infinite."""
        channels = [{**asdict(c), "relative_l2": finite(c.relative_l2)} for c in self.channels]
        return {
            "relative_l2": finite(self.relative_l2),
            "largest": self.largest,
            "largest_relative": finite(self.largest_relative),
            "worst_frame": self.worst,
            "channels": channels,
            "frames": [finite(value) for value in self.frames],
        }


def compare_latents(reference: Tensor, result: Tensor) -> LatentComparison:
    """Compare two latents of one shape.

    Args:
        reference: (batch, channels, height, width), where the batch are the frames of a VAE of images, or
            (batch, channels, frames, height, width).

    Raises:
        InputError: they are of two shapes.
    """
    if reference.shape != result.shape:
        raise InputError(f"latents of shapes {tuple(reference.shape)} and {tuple(result.shape)} can't be compared")
    a, b = _by_frame(reference.double()), _by_frame(result.double())
    gap = b - a
    channels = tuple(
        ChannelScores(
            channel=index,
            relative_l2=_relative(gap[:, index], a[:, index]),
            largest=float(gap[:, index].abs().max()),
            shift=float(gap[:, index].mean()),
        )
        for index in range(a.shape[1])
    )
    largest = float(gap.abs().max())
    return LatentComparison(
        relative_l2=_relative(gap, a),
        largest=largest,
        largest_relative=_share(largest, float(a.abs().max())),
        channels=channels,
        frames=tuple(_relative(one, other) for one, other in zip(gap, a, strict=True)),
    )


def _by_frame(latents: Tensor) -> Tensor:
    """(frames, channels, height, width)."""
    return latents if latents.ndim == 4 else latents.transpose(1, 2).flatten(0, 1)


def _relative(gap: Tensor, reference: Tensor) -> float:
    return _share(float(torch.linalg.vector_norm(gap)), float(torch.linalg.vector_norm(reference)))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


# ---- gates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One limit, and what was found."""

    name: str
    limit: float
    found: float
    """In the worst frame."""
    frame: int
    """The worst one, counted from 0."""
    is_minimum: bool
    """Whether `found` has to be at least `limit`, or at most."""
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.found >= self.limit if self.is_minimum else self.found <= self.limit

    def __str__(self) -> str:
        relation = "below" if self.is_minimum else "above"
        relation = f"not {relation}" if self.passed else relation
        return f"{self.name} {self.found:.4g}{self.unit} in frame {self.frame} is {relation} {self.limit:g}{self.unit}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where null stands for what is infinite."""
        return {**vars(self), "found": finite(self.found), "passed": self.passed}


def clip_gates(found: ClipComparison, *, min_ssim: float | None = None, min_psnr: float | None = None) -> list[Gate]:
    """The gates that were asked for. Frames have to be large enough for SSIM."""
    gates: list[Gate] = []
    if min_ssim is not None:
        known = {scores.frame: scores.ssim for scores in found.frames if scores.ssim is not None}
        if not known:
            raise InputError(f"--min-ssim {min_ssim:g}: frames of less than 11 rows or columns have no SSIM")
        frame = min(known, key=lambda number: known[number])
        gates.append(Gate("SSIM", limit=min_ssim, found=known[frame], frame=frame, is_minimum=True))
    if min_psnr is not None:
        worst = found.frames[found.worst]
        gates.append(Gate("PSNR", limit=min_psnr, found=worst.psnr, frame=worst.frame, is_minimum=True, unit=" dB"))
    return gates


def latent_gates(found: LatentComparison, *, max_l2: float | None = None) -> list[Gate]:
    """The gate that was asked for: the largest relative L2 of any latent frame."""
    if max_l2 is None:
        return []
    worst = found.worst
    return [Gate("relative L2", limit=max_l2, found=found.frames[worst], frame=worst, is_minimum=False)]
