"""Frames through a VAE: 8-bit RGB to latents and back, for VAEs of images and of clips alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae.media.vae_limits import Limits, decode_arguments, latent_of, sample_of


def to_tensor(frames: NDArray[np.uint8], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(frames, height, width, 3) of 0 to 255 to (3, frames, height, width) of -1 to 1."""
    clip = torch.empty(frames.shape, dtype=dtype, device=device)
    for filled, pixels in zip(clip, frames, strict=True):  # Steps over the whole clip would take copies of it.
        levels = torch.from_numpy(np.array(pixels)).to(device)
        # Through float32 in any case: bfloat16 has too few bits to subtract 1 from these exactly.
        filled.copy_(levels.to(torch.float32) / 127.5 - 1)
    return clip.permute(3, 0, 1, 2)


class Frames(Sequence[NDArray[np.uint8]]):
    """Frames of 0 to 255 of a clip, each made when it is asked for: (height, width, 3).

    Args:
        clip: (3, frames, height, width) of -1 to 1; what is beyond is clamped.
    """

    def __init__(self, clip: Tensor) -> None:
        self._clip = clip

    def __len__(self) -> int:
        return self._clip.shape[1]

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> Frames: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | Frames:
        if isinstance(index, slice):
            return Frames(self._clip[:, index])
        levels = ((self._clip[:, index].to(torch.float32).clamp(-1, 1) + 1) * 127.5).round()
        return levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def to_frames(clip: Tensor) -> NDArray[np.uint8]:
    """(3, frames, height, width) of -1 to 1, clamped, to (frames, height, width, 3) of 0 to 255."""
    channels, *sizes = clip.shape
    frames = np.empty((*sizes, channels), np.uint8)
    for filled, pixels in zip(frames, Frames(clip), strict=True):
        filled[...] = pixels
    return frames


def encode(vae: Any, limits: Limits, clip: Tensor, after: Callable[[], None] = lambda: None) -> Tensor:
    """Encode one clip.

    Args:
        vae: its `encode` is called once, or once per frame when it is a VAE of images.
        limits: of this VAE.
        clip: (3, frames, height, width) of -1 to 1, whatever the VAE itself takes, and of sizes that it takes.
        after: called after each call of the VAE.

    Returns:
        (1, channels, latent frames, latent height, latent width), or for a VAE of images the frames as the batch.
    """
    return encode_clips(vae, limits, [clip], latent_of, after)[0]


def encode_clips(
    vae: Any, limits: Limits, clips: Sequence[Tensor], taken: Callable[[Any], Tensor] = latent_of,
    after: Callable[[], None] = lambda: None,
) -> list[Tensor]:  # fmt: skip
    """Encode clips of one size together, each as `encode` does.

    Args:
        vae: as for `encode`.
        limits: likewise.
        clips: likewise, all of one shape.
        taken: what of the VAE's output is kept.
        after: as for `encode`.
    """
    calls = list(zip(*(encode_inputs(limits, clip) for clip in clips), strict=True))

    def encoded(pictures: Sequence[Tensor]) -> Tensor:
        latent = taken(vae.encode(pictures[0] if len(clips) == 1 else torch.cat(list(pictures))))
        after()
        return latent

    together = _joined(map(encoded, calls), len(calls))
    if len(clips) == 1:
        return [together]
    together = together.unflatten(0, (len(calls), len(clips), -1))
    return [together[:, number].flatten(0, 1) for number in range(len(clips))]


def encode_inputs(limits: Limits, clip: Tensor) -> list[Tensor]:
    """What the VAE's `encode` gets for a clip, call by call.

    Raises:
        InputError: it is not known which numbers the VAE takes.
    """
    clip = limits.known_pixels().from_signed(clip)
    if limits.lead:
        clip = torch.cat([clip[:, :1].expand(-1, limits.lead, -1, -1), clip], dim=1)
    if limits.channels > clip.shape[0]:
        clip = torch.cat([clip, torch.ones_like(clip[:1])])  # Alpha: opaque.
    # One by one, where it is possible: a batch of all frames would hold all their activations at once.
    parts = clip.split(1, dim=1) if limits.per_frame else (clip,)
    return [part.unsqueeze(0) if limits.has_frame_dim else part.transpose(0, 1) for part in parts]


def decode(vae: Any, limits: Limits, latents: Tensor, after: Callable[[], None] = lambda: None) -> Tensor:
    """Decode what `encode` returned, to (3, frames, height, width) of -1 to 1.

    Args:
        vae: its `decode` is called `decode_calls` times.
        limits: of this VAE.
        latents: as `encode` returns them.
        after: called after each call of the VAE.

    Raises:
        InputError: it is not known which numbers the VAE gives.
    """
    pixels = limits.known_pixels()
    calls = decode_calls(vae, limits, latents)

    def decoded(part: Tensor) -> Tensor:
        sample = sample_of(vae.decode(part, **decode_arguments(vae, part)))
        after()
        return sample.transpose(1, 2) if limits.frames_first else sample

    sample = _joined(map(decoded, latents.split(latents.shape[0] // calls)), calls)
    # The frames are the batch, with a frame dimension of one or without; or else it is a batch of one.
    clip = sample.transpose(0, 1)
    return pixels.to_signed(clip[:3] if sample.ndim == 4 else clip.flatten(1, 2)[:3])


def decode_calls(vae: Any, limits: Limits, latents: Tensor) -> int:
    """How often `decode` will call the VAE."""
    takes_clip = "num_frames" in decode_arguments(vae, latents)
    return latents.shape[0] if limits.per_frame and not takes_clip else 1


def _joined(parts: Iterable[Tensor], count: int) -> Tensor:
    """`count` tensors of one shape behind each other, without ever holding them twice."""
    whole: Tensor | None = None
    for number, part in enumerate(parts):
        if count == 1:
            return part
        if whole is None:
            whole = part.new_empty((count * part.shape[0], *part.shape[1:]))
        whole[number * part.shape[0] : (number + 1) * part.shape[0]] = part
    assert whole is not None, "there is at least one"
    return whole
