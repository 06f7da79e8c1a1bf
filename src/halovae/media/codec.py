"""Frames through a VAE: 8-bit RGB to latents and back, for VAEs of images and of clips alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae.media.vae_limits import Fit, Limits, decode_arguments, latent_of, sample_of

LONG = 16
"""Latent frames. A longer clip goes through in parts. A shorter one fits into memory, and one call takes less time than
to find out by trying which frames a part needs."""


def to_tensor(frames: NDArray[np.uint8], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(frames, height, width, 3) of 0 to 255 to (3, frames, height, width) of -1 to 1."""
    clip = torch.empty(frames.shape, dtype=dtype, device=device)
    for filled, pixels in zip(clip, frames, strict=True):  # Steps over the whole clip would take copies of it.
        levels = torch.from_numpy(np.array(pixels)).to(device)
        # Through float32 in any case: bfloat16 has too few bits to subtract 1 from these exactly.
        filled.copy_(levels.to(torch.float32) / 127.5 - 1)
    return clip.permute(3, 0, 1, 2)


def frames_of(clip: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Frames of 0 to 255, (height, width, 3), of a clip (3, frames, height, width) of -1 to 1; what is beyond is
    clamped.

    Each is made when it is asked for.
    """
    for picture in clip.unbind(1):
        levels = ((picture.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round()
        yield levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def to_frames(clip: Tensor) -> NDArray[np.uint8]:
    """(3, frames, height, width) of -1 to 1, clamped, to (frames, height, width, 3) of 0 to 255."""
    channels, *sizes = clip.shape
    frames = np.empty((*sizes, channels), np.uint8)
    for filled, pixels in zip(frames, frames_of(clip), strict=True):
        filled[...] = pixels
    return frames


def padded(frames: Iterable[NDArray[np.uint8]], fit: Fit, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Frames of 0 to 255, (height, width, 3), as clips of one frame, (3, 1, padded height, padded width) of -1 to 1; as
    many as `fit` wants."""
    one = replace(fit, frames=1, padded_frames=1)
    picture = None
    for frame in frames:
        picture = one.pad(to_tensor(frame[None], dtype, device))
        yield picture
    assert picture is not None, "a clip has a frame"
    for _ in range(fit.padded_frames - fit.frames):
        yield picture


def encode(vae: Any, limits: Limits, clip: Tensor) -> Tensor:
    """Encode one clip.

    Args:
        vae: its `encode` is called once, or once per frame when it is a VAE of images.
        clip: (3, frames, height, width) of -1 to 1, whatever the VAE itself takes, and of sizes that it takes.

    Returns:
        (1, channels, latent frames, latent height, latent width), or for a VAE of images the frames as the batch.
    """
    return joined(limits, encode_pieces(vae, limits, clip.split(1, dim=1), clip.shape[1]))


def encode_clips(
    vae: Any, limits: Limits, clips: Sequence[Tensor], taken: Callable[[Any], Tensor] = latent_of
) -> list[Tensor]:  # fmt: skip
    """Encode clips of one shape together, each as `encode` does; `taken` is what of the VAE's output is kept."""
    calls = list(zip(*(encode_calls(limits, clip.split(1, dim=1), clip.shape[1]) for clip in clips), strict=True))
    found = [taken(vae.encode(torch.cat(pictures))) for pictures in calls]
    by_clip = zip(*(latents.chunk(len(clips)) for latents in found), strict=True)
    return [joined(limits, latents) for latents in by_clip]


def joined(limits: Limits, latents: Iterable[Tensor]) -> Tensor:
    """What `encode_pieces` gives, in one."""
    pieces = list(latents)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=limits.time_dim)


def encode_pieces(
    vae: Any,
    limits: Limits,
    frames: Iterable[Tensor],
    count: int,
    after: Callable[[], None] = lambda: None,
    stream: Callable[..., Any] | None = None,
    at_once: int = LONG,
) -> Generator[Tensor]:
    """As `encode`, of `count` frames that come as parts of one; latents come as soon as they are final.

    Args:
        after: called after each call of the VAE.
        stream: `encode_stream` of the VAE's handle, for a long clip; ranks that `gather` does not name get what they
            hold. None: any clip is encoded in one call.
        at_once: so many latent frames are no long clip.
    """
    if stream is not None and not limits.per_frame and count > at_once * max(1, limits.period):
        with closing(stream(encode_inputs(limits, frames), count=limits.lead + count)) as parts:
            for part in parts:
                after()
                yield latent_of(part)
                del part
        return
    for picture in encode_calls(limits, frames, count):
        latent = latent_of(vae.encode(picture))
        del picture
        after()
        yield latent
        del latent


def encode_calls(limits: Limits, frames: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """What the VAE's `encode` gets for a clip, call by call; as `encode_pieces` gets the frames."""
    pictures = encode_inputs(limits, frames)
    # One by one, where it is possible: a batch of all frames would hold all their activations at once.
    return pictures if limits.per_frame else iter([_filled(pictures, limits.lead + count, dim=2)])


def encode_inputs(limits: Limits, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """The parts of one frame that the VAE's `encode` gets for a clip."""
    pixels, lead = limits.known_pixels(), limits.lead
    for frame in frames:
        picture = pixels.from_signed(frame)
        if limits.channels > picture.shape[0]:
            picture = torch.cat([picture, torch.ones_like(picture[:1])])  # Alpha: opaque.
        picture = picture.unsqueeze(0) if limits.has_frame_dim else picture.transpose(0, 1)
        for _ in range(1 + lead):
            yield picture
        lead = 0


def decode(vae: Any, limits: Limits, latents: Tensor) -> Tensor:
    """Decode what `encode` returned, by `decode_calls` calls, to (3, frames, height, width) of -1 to 1."""
    limits.known_pixels()
    return _filled(decode_pieces(vae, limits, latents), decode_calls(vae, limits, latents), dim=1)


def decode_pieces(
    vae: Any, limits: Limits, latents: Tensor, after: Callable[[], None] = lambda: None,
    stream: Callable[..., Any] | None = None, place: Callable[[Tensor], Tensor] = lambda part: part,
) -> Generator[Tensor]:  # fmt: skip
    """As `decode`, but the frames come as soon as they are final, some at a time.

    Args:
        after: called after each call of the VAE.
        stream: `decode_stream` of the VAE's handle; ranks that `gather` does not name get what they hold. None: each
            call of the VAE gives one piece.
        place: puts latents where the VAE takes them, when they are due.
    """
    pixels = limits.known_pixels()
    for part in latents.split(latents.shape[0] // decode_calls(vae, limits, latents)):
        with closing(_samples(vae, part, stream, place)) as samples:
            for sample in samples:
                # The frames are the batch, with a frame dimension of one or without; or else it is a batch of one.
                clip = (sample.transpose(1, 2) if limits.frames_first else sample).transpose(0, 1)
                clip = clip[:3] if sample.ndim == 4 else clip.flatten(1, 2)[:3]
                del sample
                yield pixels.to_signed(clip)
                del clip
        after()


def _samples(
    vae: Any, latents: Tensor, stream: Callable[..., Any] | None, place: Callable[[Tensor], Tensor]
) -> Generator[Tensor]:  # fmt: skip
    """What one call of `decode` gives, in one piece or by a stream in several."""
    if stream is not None and latents.ndim == 5 and latents.shape[2] > LONG:
        arguments = decode_arguments(vae, place(latents[:, :, :1]))
        parts = stream(map(place, latents.split(1, dim=2)), count=latents.shape[2], **arguments)
    else:
        latents = place(latents)
        arguments = decode_arguments(vae, latents)
        if stream is None:
            yield sample_of(vae.decode(latents, **arguments))
            return
        parts = stream(latents, **arguments)
    with closing(parts) as pieces:
        yield from pieces


def decode_calls(vae: Any, limits: Limits, latents: Tensor) -> int:
    """How often `decode` will call the VAE."""
    takes_clip = "num_frames" in decode_arguments(vae, latents)
    return latents.shape[0] if limits.per_frame and not takes_clip else 1


def _filled(parts: Iterable[Tensor], count: int, dim: int) -> Tensor:
    """`count` tensors of one shape behind each other, without ever holding them twice."""
    whole: Tensor | None = None
    for number, part in enumerate(parts):
        if count == 1:
            return part
        if whole is None:
            shape = list(part.shape)
            shape[dim] *= count
            whole = part.new_empty(shape)
        whole.narrow(dim, number * part.shape[dim], part.shape[dim]).copy_(part)
    assert whole is not None, "there is at least one"
    return whole
