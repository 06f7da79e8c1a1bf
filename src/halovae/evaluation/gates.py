"""Gates: limits that every frame has to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halovae.base.errors import InputError
from halovae.evaluation.clip_scores import ClipComparison
from halovae.evaluation.latent_scores import LatentComparison
from halovae.evaluation.numbers import finite


@dataclass(frozen=True, kw_only=True)
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
    """The gates that were asked for.

    Raises:
        InputError: the frames are too small for SSIM.
    """
    gates: list[Gate] = []
    if min_ssim is not None:
        known = {scores.frame: scores.ssim for scores in found.frames if scores.ssim is not None}
        if not known:
            raise InputError(f"--min-ssim {min_ssim:g}: frames of less than 11 rows or columns have no SSIM")
        frame = min(known, key=lambda number: known[number])
        gates.append(Gate(name="SSIM", limit=min_ssim, found=known[frame], frame=frame, is_minimum=True))
    if min_psnr is not None:
        worst = found.frames[found.worst]
        gates.append(
            Gate(name="PSNR", limit=min_psnr, found=worst.psnr, frame=worst.frame, is_minimum=True, unit=" dB")
        )
    return gates


def latent_gates(found: LatentComparison, *, max_l2: float | None = None) -> list[Gate]:
    """The gate that was asked for: the largest relative L2 of any latent frame."""
    if max_l2 is None:
        return []
    worst = found.worst
    return [Gate(name="relative L2", limit=max_l2, found=found.frames[worst], frame=worst, is_minimum=False)]
