"""Latents against their reference, over all and by channel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import InputError
from halovae.evaluation.numbers import finite


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
    largest, scale = float(gap.abs().max()), float(a.abs().max())
    return LatentComparison(
        relative_l2=_relative(gap, a),
        largest=largest,
        largest_relative=_share(largest, scale),
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
