"""Latents on disk: one safetensors file with one tensor and what is needed to decode it.

The tensor holds the VAE's own latents (the mode of its distribution), before any pipeline's scaling. The scaling that a
pipeline would apply is recorded beside it, so that nobody has to guess which of the two a file holds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from halovae.base.errors import InputError
from halovae.base.files import atomic, check_input, first_line, reason
from halovae.media.vae_limits import Fit, Limits

FORMAT = "halovae-latents-1"
KEY, PARAMETERS = "latents", "parameters"
"""Names of the tensor: the latents, or mean and logarithm of the variance one behind the other along the channels."""
SUFFIX = ".safetensors"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors names them."""
_INTEGERS = tuple(Fit.__dataclass_fields__)
_SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True)
class LatentsInfo(Fit):
    """The metadata of a latents file. Of its sizes the padded ones went through the VAE: decode, then crop."""

    model: str
    """What `--model` was: "demo", a folder, or a hub id."""
    model_class: str
    """The VAE's class in diffusers."""
    scaling: Mapping[str, Any]
    """`scaling_factor`, `shift_factor`, `latents_mean`, `latents_std` of the VAE's config, those that it has."""
    fps: Fraction
    times: tuple[int, ...] = ()
    """As in `media.Clip`: where frames come unevenly, when each begins and the final one ends, in 1/90000 s."""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            size, padded = getattr(self, name), getattr(self, f"padded_{name}")
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
        """Check and convert."""
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


def scaling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a VAE's config says of the scaling that pipelines apply to its latents."""
    return {key: config[key] for key in _SCALING_KEYS if config.get(key) is not None}


class LatentsWriter:
    """Writes latents that come in parts, whole or not at all; none of them is held. Within it, `put` them; then
    `finish`. Until then they are in a file without a name beside `path`, as only the end tells where each belongs.

    Args:
        path: ends with ".safetensors".
        dim: along which the parts are joined, 0 or 2.

    Attributes:
        shape: of what has come so far.
    """

    def __init__(self, path: Path, dim: int = 0) -> None:
        self.shape: tuple[int, ...] = ()
        self._path, self._dim, self._dtype = path, dim, torch.float32
        self._spool: IO[bytes] | None = None

    def put(self, part: Tensor) -> None:
        """Take the next part: (batch, channels, height, width) or (batch, channels, frames, height, width), not scaled.

        Raises:
            InputError: it can't be written, or is not finite.
        """
        check_values(self._path, part)
        joined = self.shape[self._dim] if self.shape else 0
        self.shape = (*part.shape[: self._dim], joined + part.shape[self._dim], *part.shape[self._dim + 1 :])
        self._dtype = part.dtype
        words = part.detach().cpu().movedim(self._dim, 0).contiguous().view(torch.uint8).numpy().reshape(-1).data
        try:
            if self._spool is None:
                self._spool = tempfile.TemporaryFile(  # noqa: SIM115  # `__exit__` closes it.
                    dir=self._path.parent, prefix=".halovae-", buffering=0
                )
            while words:
                words = words[os.write(self._spool.fileno(), words) :]
        except OSError as error:
            raise InputError(f"can't write {self._path}: {reason(error)}") from error

    def finish(self, info: LatentsInfo) -> None:
        """Write the file."""
        assert self._spool is not None, "there is a part"
        size = self._dtype.itemsize * math.prod(self.shape)
        blocks = math.prod(self.shape[: self._dim])  # Of each place along `dim`.
        block = size // (blocks * self.shape[self._dim])
        about = {"dtype": _DTYPES[self._dtype], "shape": list(self.shape), "data_offsets": [0, size]}
        with atomic(self._path) as draft, draft.open("wb") as file:
            file.write(_header({"__metadata__": info.to_metadata(), KEY: about}))
            for number, place in itertools.product(range(blocks), range(self.shape[self._dim])):
                file.write(os.pread(self._spool.fileno(), block, (place * blocks + number) * block))

    def __enter__(self) -> LatentsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._spool is not None:
            self._spool.close()


def content_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Equal tensors and metadata give equal bytes, which safetensors itself does not promise."""
    # As bytes, because a file that safetensors makes is readable by its owner only, whatever the umask says.
    content = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    begin = 8 + int.from_bytes(content[:8], "little")
    # It writes metadata in the order of a hash that each process draws anew.
    return _header({"__metadata__": dict(metadata), **json.loads(content[8:begin])}) + content[begin:]


def _header(about: Mapping[str, Any]) -> bytes:
    words = json.dumps(about).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words


def load(path: Path) -> tuple[Tensor, LatentsInfo]:
    """Read latents and check all that can be checked without the VAE.

    Raises:
        InputError: no safetensors file, not one of ours, or values that are no latents.
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
        why = f": {reason(error)}" if isinstance(error, OSError) else ""
        raise InputError(f"{path} holds no latents: it is no safetensors file, or a damaged one{why}") from error
    check_values(path, latents)
    return latents, info


def check_shape(latents: Tensor, info: LatentsInfo, limits: Limits, name: str) -> None:
    """Refuse latents, as `load` returns them, that a VAE (its class's `name`) did not make, before any is decoded."""
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
    """Refuse latents of another number of dimensions or format, or some that are not finite."""
    if latents.ndim not in (4, 5) or latents.numel() == 0:
        raise InputError(f"{path}: latents of shape {tuple(latents.shape)}: need 4 or 5 dimensions, none empty")
    if latents.dtype not in _DTYPES:
        raise InputError(f"{path}: latents of {latents.dtype}: need one of {', '.join(map(str, _DTYPES))}")
    # In parts, since what is found takes memory too.
    bad = sum(int((~torch.isfinite(few)).sum()) for part in latents.split(16) for few in part.split(16, dim=2))
    if bad:
        raise InputError(f"{path}: {bad} of {latents.numel()} latents are NaN or infinite")
