"""What a VAE takes, learnt by asking it, and how a clip is padded to that and cropped back.

A VAE in diffusers may drop trailing frames, or rows and columns off its compression ratio, without a word. No attribute
tells the valid sizes of every VAE, so its own code is run on a twin without weights (on the meta device: shapes only,
no arithmetic), and sizes in and out are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halovae.errors import InputError
from halovae.files import first_line
from halovae.models import skeleton

_SIDE = 128
"""Pixels of the trial's picture: a multiple of every compression ratio in use, and large enough for every padding."""
_SEARCH = 32
"""How many frames to add at most in search of a valid count."""
_CHANNELS = (3, 4)
"""RGB, or RGB with alpha. Audio and protein autoencoders take neither."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One clip's sizes and those that go through the VAE. Padding is behind the last frame, below and to the right."""

    frames: int
    height: int
    width: int
    padded_frames: int
    padded_height: int
    padded_width: int

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each kind of padding."""
        lines: list[str] = []
        if self.padded_frames != self.frames:
            lines.append(f"{self.frames} frames padded to {self.padded_frames} for the VAE, cropped back after it")
        if (self.padded_height, self.padded_width) != (self.height, self.width):
            padded = f"{self.padded_width}x{self.padded_height}"
            lines.append(f"{self.width}x{self.height} padded to {padded} for the VAE, cropped back after it")
        return tuple(lines)

    def pad(self, clip: Tensor) -> Tensor:
        """(channels, frames, height, width) to the padded sizes, by repeating the edge and the last frame."""
        missing = (self.padded_frames - self.frames, self.padded_height - self.height, self.padded_width - self.width)
        if not any(missing):
            return clip
        amounts = (0, missing[2], 0, missing[1], 0, missing[0])
        return functional.pad(clip.unsqueeze(0), amounts, mode="replicate").squeeze(0)

    def crop(self, clip: Tensor) -> Tensor:
        """Undo `pad`.

        Raises:
            InputError: `clip` has not the padded sizes: the VAE has changed them.
        """
        padded = (self.padded_frames, self.padded_height, self.padded_width)
        if tuple(clip.shape[1:]) != padded:
            raise InputError(
                f"the VAE gave back {_sizes(*clip.shape[1:])} for {_sizes(*padded)}: it does not keep these sizes"
            )
        return clip[:, : self.frames, : self.height, : self.width]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one VAE takes and gives."""

    has_frame_dim: bool
    """Whether it takes (batch, channels, frames, height, width), or else (batch, channels, height, width)."""
    per_frame: bool
    """Whether each frame goes through by itself."""
    channels: int
    latent_channels: int
    ratio: int
    """Pixels per latent, along height and width."""
    padded_count: Callable[[int], int]
    """The smallest frame count from the given one on that goes through the VAE whole."""

    def fit(self, frames: int, height: int, width: int) -> Fit:
        """How a clip of these sizes goes through the VAE.

        Raises:
            InputError: no frame count near `frames` comes out whole.
        """
        return Fit(
            frames=frames,
            height=height,
            width=width,
            padded_frames=self.padded_count(frames),
            padded_height=-(-height // self.ratio) * self.ratio,
            padded_width=-(-width // self.ratio) * self.ratio,
        )


def limits_of(vae: nn.Module) -> Limits:
    """Learn what `vae` takes. Its weights are not touched.

    Raises:
        InputError: it takes no RGB images or clips, or doesn't keep their size.
    """
    trial = _Trial(vae)
    channels, has_frame_dim, latent = trial.first()
    if _SIDE % latent.shape[-1] or latent.shape[-1] != latent.shape[-2]:
        raise InputError(
            f"{trial.name} makes latents of {tuple(latent.shape)} from {_SIDE}x{_SIDE} pixels: not to scale"
        )
    per_frame = not has_frame_dim or trial.is_for_images()
    return Limits(
        has_frame_dim=has_frame_dim,
        per_frame=per_frame,
        channels=channels,
        latent_channels=latent.shape[1],
        ratio=_SIDE // latent.shape[-1],
        padded_count=(lambda frames: frames) if per_frame else trial.padded_count,
    )


class _Trial:
    """Runs a VAE's code on shapes. Each run has a fresh twin: a failed one may leave its caches filled."""

    def __init__(self, vae: nn.Module) -> None:
        self.name = type(vae).__name__
        self._vae = vae
        self._channels = 0
        self.latent_frames = cache(self._latent_frames)
        self.returned = cache(self._returned)

    def first(self) -> tuple[int, bool, Tensor]:
        """Channels, whether there is a frame dimension, and a latent (on meta) of a square of `_SIDE` pixels."""
        problems: list[str] = []
        # 25 frames satisfy every VAE that wants more than one.
        for frames in ((1,), (25,), ()):
            for channels in _CHANNELS:
                twin, latent = self._twin(), None
                try:
                    latent = self._encode(twin, (1, channels, *frames, _SIDE, _SIDE))
                    sample = _decode(twin, latent)
                except Exception as error:  # Whatever a model's code raises on a shape that it can't take.
                    if latent is None:
                        problems.append(f"takes neither RGB images nor RGB clips: {first_line(error)}")
                    else:  # The shape was right, so this says more.
                        problems.insert(0, f"can't decode what it encodes: {first_line(error)}")
                    continue
                if sample.shape[-2:] != (_SIDE, _SIDE):
                    got = _sizes(1, *sample.shape[-2:])
                    raise InputError(
                        f"{self.name} gives back {got} for {_sizes(1, _SIDE, _SIDE)}: it resizes its input"
                    )
                self._channels = channels
                return channels, bool(frames), latent
        raise InputError(f"{self.name} {problems[0]}")

    def is_for_images(self) -> bool:
        """Whether it keeps one frame, and no other count that a clip might have."""
        return self._keeps(1) and self._period() is None and not any(map(self._keeps, range(2, _SEARCH)))

    def padded_count(self, frames: int) -> int:
        """See `Limits.padded_count`."""
        period = self._period()
        start = frames if period is None else 1 + -(-(frames - 1) // period) * period
        for count in range(start, frames + _SEARCH, period or 1):
            if self._keeps(count if period is None else _equivalent(count)):
                return count
        raise InputError(
            f"{self.name} keeps no frame count from {frames} to {frames + _SEARCH - 1}: "
            f"choose another with --frames A:B"
        )

    def _period(self) -> int | None:
        """k if 1, 1 + k, 1 + 2k, ... frames are valid. Costs far less than trying a long clip."""
        for base in (8, 24):
            one, more = self.latent_frames(1), self.latent_frames(1 + base)
            if one and more and more > one and base % (more - one) == 0 and self._keeps(1 + base):
                return base // (more - one)
        return None

    def _keeps(self, frames: int) -> bool:
        return self.returned(frames) == frames

    def _latent_frames(self, frames: int) -> int:
        try:
            return int(self._encode(self._twin(), (1, self._channels, frames, _SIDE, _SIDE)).shape[2])
        except Exception:  # As in `first`.
            return 0

    def _returned(self, frames: int) -> int:
        twin = self._twin()
        try:
            latent = self._encode(twin, (1, self._channels, frames, _SIDE, _SIDE))
            return int(_decode(twin, latent).shape[2])
        except Exception:  # As in `first`.
            return 0

    def _encode(self, twin: Any, shape: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return latent_of(twin.encode(torch.empty(shape, device="meta")))

    def _twin(self) -> Any:
        vae: Any = self._vae
        return skeleton(type(vae), vae.config)


def _decode(twin: Any, latent: Tensor) -> Tensor:
    with torch.no_grad():
        return sample_of(twin.decode(latent, **decode_arguments(twin, latent)))


def _equivalent(frames: int) -> int:
    """A short clip that a periodic VAE treats as a long one: every period in use divides 24."""
    return frames if frames < 33 else 9 + (frames - 9) % 24


def latent_of(output: Any) -> Tensor:
    """The latent in what `encode` returned: the mode where it is a distribution."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    for name in ("latents", "latent"):
        if hasattr(output, name):
            return getattr(output, name)
    raise InputError(f"encode returned a {type(output).__name__}, which holds no latents that halovae knows")


def sample_of(output: Any) -> Tensor:
    """The picture in what `decode` returned."""
    return output if isinstance(output, Tensor) else output.sample


def decode_arguments(vae: Any, latent: Tensor) -> dict[str, Any]:
    """What `decode` needs besides the latent."""
    arguments: dict[str, Any] = {}
    if "num_frames" in inspect.signature(vae.decode).parameters:
        # A decoder that takes the frames of one clip as its batch.
        arguments["num_frames"] = latent.shape[0]
    if vae.config.get("timestep_conditioning"):
        # A decoder that can also denoise: 0 says that there is no noise.
        arguments["temb"] = torch.zeros(latent.shape[0], dtype=latent.dtype, device=latent.device)
    return arguments


def _sizes(frames: int, height: int, width: int) -> str:
    return f"{frames} frame{'s' * (frames != 1)} of {width}x{height}"
