"""Which pixels and frames become which tokens: arithmetic on a few whole numbers of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halovae.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How pixels become tokens."""

    ratio: int
    """Pixels per latent, along height and width."""
    period: int
    """Frames per latent frame, after the first; 0 for a VAE of images."""
    patch_frames: int
    patch_side: int
    """Latents per token, along height and width."""

    @property
    def multiple(self) -> int:
        """What height and width are multiples of."""
        return self.ratio * self.patch_side

    def check_side(self, name: str, size: int | None) -> None:
        """Refuse a height or width (None: not known yet) that would be changed.

        Raises:
            InputError: tells the nearest that fit.
        """
        if size is not None and size % self.multiple:
            lower = size // self.multiple * self.multiple
            nearest = [str(n) for n in (lower, lower + self.multiple) if n]
            raise InputError(f"{name} {size} is not a multiple of {self.multiple}: use {' or '.join(nearest)}")

    def check_count(self, name: str, frames: int) -> None:
        """Refuse a count of frames that would be changed.

        Raises:
            InputError: as above.
        """
        if self.period and (frames - 1) % self.period:
            lower = (frames - 1) // self.period * self.period + 1
            raise InputError(
                f"{name} {frames} is not a multiple of {self.period} plus 1: use {lower} or {lower + self.period}"
            )

    def nearest_count(self, frames: float) -> int:
        """The count of frames that the VAE takes and that is nearest."""
        period = self.period or 1
        return max(0, round((frames - 1) / period)) * period + 1

    def latent_frames(self, frames: int) -> int:
        return frames if not self.period else (frames - 1) // self.period + 1

    def tokens(self, height: int, width: int, frames: int) -> int:
        """Of the picture that is made. Text, and pictures that are given as tokens too, come on top."""
        rows, columns = height // self.multiple, width // self.multiple
        return math.ceil(self.latent_frames(frames) / self.patch_frames) * rows * columns
