"""Which pixels and frames become which tokens: arithmetic on a few whole numbers of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from halovae.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """How pixels become tokens."""

    ratio: int
    """Pixels per latent, along height and width."""
    period: int
    """Frames per latent frame, after the first; 0 for a VAE of images."""
    step: int
    """Small counts of frames that the VAE keeps are 1 and multiples of this more; 0 where they follow no such rule."""
    patch_frames: int
    patch_side: int
    """Latents per token, along height and width."""
    padded_count: Callable[[int], int] | None = field(default=None, compare=False, repr=False)
    """The VAE's own answer: the smallest count from the given one on that it keeps. None where there is no VAE to ask,
    and `step` stands for it."""

    def numbers(self) -> dict[str, int]:
        """What of it can travel; a grid of them tells less of counts."""
        return {name: value for name, value in vars(self).items() if name != "padded_count"}

    @property
    def multiple(self) -> int:
        """What height and width are multiples of."""
        return self.ratio * self.patch_side

    def check_side(self, name: str, size: int | None) -> None:
        """Refuse a height or width (None: not known yet) that would be changed."""
        if size is not None and size % self.multiple:
            lower = size // self.multiple * self.multiple
            nearest = [str(n) for n in (lower, lower + self.multiple) if n]
            raise InputError(f"{name} {size} is not a multiple of {self.multiple}: use {' or '.join(nearest)}")

    def check_count(self, name: str, frames: int) -> None:
        """Refuse a count of frames that would be changed."""
        nearest = self._nearest_counts(frames)
        if frames not in nearest:
            raise InputError(f"{name} {frames}: the VAE would change it, use {' or '.join(map(str, nearest))}")

    def nearest_count(self, frames: float) -> int:
        """The count of frames that the VAE takes and that is nearest."""
        return min(self._nearest_counts(max(1, round(frames))), key=lambda count: abs(count - frames))

    def _nearest_counts(self, frames: int) -> list[int]:
        """This count if the VAE keeps it, else the next smaller (if any) and the next larger one that it does."""
        above = self._next_count(frames)
        if above == frames:
            return [above]
        counts = map(self._next_count, range(frames - 1, max(0, frames - _SEARCH), -1))
        below = next((count for count in counts if count < frames), None)
        return [above] if below is None else [below, above]

    def _next_count(self, frames: int) -> int:
        if self.padded_count is not None:
            return self.padded_count(frames)
        return frames + (1 - frames) % (self.step or 1)

    def latent_frames(self, frames: int) -> int:
        return frames if not self.period else (frames - 1) // self.period + 1

    def tokens(self, height: int, width: int, frames: int) -> int:
        """Of the picture that is made. Text, and pictures that are given as tokens too, come on top."""
        rows, columns = height // self.multiple, width // self.multiple
        return math.ceil(self.latent_frames(frames) / self.patch_frames) * rows * columns

    def check_tokens(self, height: int, width: int, frames: int, parts: int, mark: str = "--") -> None:
        """Refuse a picture whose tokens `parts` ranks can't share. In the message `mark` is before names of sizes."""
        if self.tokens(height, width, frames) % parts == 0:
            return
        heights = self._nearest_sides(height, lambda n: self.tokens(n, width, frames) % parts == 0)
        widths = self._nearest_sides(width, lambda n: self.tokens(height, n, frames) % parts == 0)
        found = {"height": heights, "width": widths}
        ways = [f"{mark}{name} {' or '.join(map(str, sizes))}" for name, sizes in found.items()]
        raise InputError(
            f"{width}x{height} and {frames} frames make {self.tokens(height, width, frames)} tokens, which {parts} "
            f"ranks can't share evenly: use {', or '.join(ways)}"
        )

    def _nearest_sides(self, size: int, fits: Callable[[int], bool]) -> list[int]:
        """The next smaller and the next larger that fit; there is always a larger one."""
        step = self.multiple
        smaller = next((n for n in range(size - step, 0, -step) if fits(n)), None)
        larger = next(n for n in itertools.count(size + step, step) if fits(n))
        return [larger] if smaller is None else [smaller, larger]


_SEARCH = 32
"""How far below a count a smaller one is looked for."""
