"""Latents on disk: one safetensors file with one tensor and what is needed to decode it.

The tensor holds the VAE's own latents (the mode of its distribution), before any pipeline's scaling. The scaling that a
pipeline would apply is recorded beside it, so that nobody has to guess which of the two a file holds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from halovae.base.errors import InputError
from halovae.base.files import atomic, check_input, first_line

if TYPE_CHECKING:
    from halovae.media.vae_limits import Limits

FORMAT = "halovae-latents-1"
KEY, PARAMETERS = "latents", "parameters"
"""Names of the tensor: the latents, or mean and logarithm of the variance one behind the other along the channels."""
SUFFIX = ".safetensors"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """The metadata of a latents file."""

    model: str
    """What `--model` was: "demo", a folder, or a hub id."""
    model_class: str
    """The VAE's class in diffusers."""
    scaling: Mapping[str, Any]
    """`scaling_factor`, `shift_factor`, `latents_mean`, `latents_std` of the VAE's config, those that it has."""
    fps: Fraction
    frames: int
    """Of the clip. The padded sizes below are those that went through the VAE: decode, then crop to these."""
    height: int
    width: int
    padded_frames: int
    padded_height: int
    padded_width: int
    times: tuple[int, ...] = ()
    """As in `media.Clip`: where frames come unevenly, when each begins and the final one ends, in 1/90000 s."""

    def __post_init__(self) -> None:
        pairs = {
            "frames": (self.frames, self.padded_frames),
            "height": (self.height, self.padded_height),
            "width": (self.width, self.padded_width),
        }
        for name, (size, padded) in pairs.items():
            if not 1 <= size <= padded:
                raise InputError(f"metadata {name}={size}, padded to {padded}: need 1 <= {name} <= padded_{name}")
        if self.fps <= 0:
            raise InputError(f"metadata fps={self.fps}: needs to be positive")
        gaps = [end - begin for begin, end in zip(self.times[:-1], self.times[1:], strict=True)]
        in_order = all(0 < gap < 2**31 for gap in gaps)  # An mp4 holds no longer ones.
        if self.times and not (len(self.times) == self.frames + 1 and self.times[0] == 0 and in_order):
            raise InputError(f"metadata times: needs {self.frames + 1} numbers that grow from 0")

    def to_metadata(self) -> dict[str, str]:
        """As safetensors stores it: text to text."""
        sizes = {name: str(getattr(self, name)) for name in _INTEGERS}
        return {
            "format": FORMAT,
            "model": self.model,
            "model_class": self.model_class,
            "scaling": json.dumps(dict(self.scaling)),
            "fps": str(self.fps),
            **({"times": json.dumps(self.times)} if self.times else {}),
            **sizes,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> LatentsInfo:
        """Check and convert.

        Raises:
            InputError: a key is missing or a value is not what its name says.
        """
        if metadata.get("format") != FORMAT:
            raise InputError(f"not latents of halovae: metadata format is {metadata.get('format')!r}, not {FORMAT!r}")
        missing = [key for key in ("model", "model_class", "scaling", "fps", *_INTEGERS) if key not in metadata]
        if missing:
            raise InputError(f"metadata lacks {', '.join(missing)}")
        try:
            scaling = json.loads(metadata["scaling"])
            times = json.loads(metadata.get("times", "[]"))
            fps = Fraction(metadata["fps"])
            sizes = {name: int(metadata[name]) for name in _INTEGERS}
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(f"metadata can't be read: {first_line(error)}") from error
        if not isinstance(scaling, dict):
            raise InputError(f"metadata scaling is {metadata['scaling'][:40]!r}, not a JSON object")
        if not isinstance(times, list) or not all(type(time) is int for time in times):
            raise InputError(f"metadata times is {metadata['times'][:40]!r}, not a list of integers")
        return cls(
            model=metadata["model"], model_class=metadata["model_class"], scaling=scaling, fps=fps, times=tuple(times),
            **sizes,
        )  # fmt: skip


_INTEGERS = ("frames", "height", "width", "padded_frames", "padded_height", "padded_width")


def scaling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a VAE's config says of the scaling that pipelines apply to its latents."""
    return {key: config[key] for key in _SCALING_KEYS if config.get(key) is not None}


def save(path: Path, latents: Tensor, info: LatentsInfo) -> None:
    """Write latents, whole or not at all.

    Args:
        path: ends with ".safetensors".
        latents: (batch, channels, height, width) or (batch, channels, frames, height, width), not scaled.
        info: the metadata.

    Raises:
        InputError: the file can't be written, or the latents are not finite.
    """
    check_values(path, latents)
    content = content_of({KEY: latents}, info.to_metadata())
    with atomic(path) as draft:
        draft.write_bytes(content)


def content_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Equal tensors and metadata give equal bytes, which safetensors itself does not promise."""
    # As bytes, because a file that safetensors makes is readable by its owner only, whatever the umask says.
    content = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    begin = 8 + int.from_bytes(content[:8], "little")
    # It writes metadata in the order of a hash that each process draws anew.
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(content[8:begin])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[begin:]


def load(path: Path) -> tuple[Tensor, LatentsInfo]:
    """Read latents and check all that can be checked without the VAE.

    Raises:
        InputError: no safetensors file, not one that `save` made, or values that are no latents.
    """
    check_input(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, sorted(file.keys())
            info = LatentsInfo.from_metadata(metadata)
            if keys not in ([KEY], [PARAMETERS]):
                raise InputError(f"holds the tensors {', '.join(keys[:5]) or '(none)'}, not just {KEY!r}")
            # The mode of the distribution is its mean.
            latents = file.get_tensor(KEY) if keys == [KEY] else file.get_tensor(PARAMETERS).chunk(2, dim=1)[0]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as error:
        raise InputError(f"{path} is no safetensors file, or a damaged one: {first_line(error)}") from error
    check_values(path, latents)
    return latents, info


def check_shape(latents: Tensor, info: LatentsInfo, limits: Limits, name: str) -> None:
    """Refuse latents that a VAE didn't make, before any of them is decoded.

    Args:
        latents: with `info`, as `load` returns them.
        info: their metadata.
        limits: of the VAE.
        name: of the VAE's class.

    Raises:
        InputError: another shape than this VAE makes of such a clip.
    """
    batch = info.padded_frames if limits.per_frame else 1
    height, width = info.padded_height // limits.ratio, info.padded_width // limits.ratio
    middle = () if not limits.has_frame_dim else (latents.shape[2] if not limits.per_frame else 1,)
    wanted = (batch, limits.latent_channels, *middle, height, width)
    if tuple(latents.shape) != wanted:
        raise InputError(
            f"latents of shape {tuple(latents.shape)} are not of {name}, whose shape for "
            f"{info.padded_frames} frames of {info.padded_width}x{info.padded_height} is {wanted}: "
            f"they were made by {info.model} ({info.model_class})"
        )
    if limits.padded_count(info.padded_frames) != info.padded_frames:
        raise InputError(f"{name} does not give back clips of {info.padded_frames} frames whole: encode the clip anew")


def check_values(path: Path, latents: Tensor) -> None:
    """
    Raises:
        InputError: latents of another number of dimensions or format, or some that are not finite.
    """
    if latents.ndim not in (4, 5) or latents.numel() == 0:
        raise InputError(f"{path}: latents of shape {tuple(latents.shape)}: need 4 or 5 dimensions, none empty")
    if latents.dtype not in _DTYPES:
        raise InputError(f"{path}: latents of {latents.dtype}: need one of {', '.join(map(str, _DTYPES))}")
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        raise InputError(f"{path}: {bad} of {latents.numel()} latents are NaN or infinite")
