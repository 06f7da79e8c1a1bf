"""`--compare`: the same clip through the VAE without any parallelism, and how far the two results are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halovae import codec
from halovae.cli.report import table
from halovae.cli.session import Half, Loaded, Session
from halovae.fit import Fit
from halovae.quality.numbers import decibel, finite
from halovae.quality.scores import psnr

GATHER = {"encode": "all", "decode": "first"}
"""Decoding takes whole latents on every rank; what comes out is written by one."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way of a clip through the VAE."""

    latents: Tensor
    sample: Tensor
    """(3, frames, height, width), cropped, not clamped; on further ranks what they hold of it."""
    frames: NDArray[np.uint8]
    encode: Half
    decode: Half

    @property
    def halves(self) -> dict[str, Half]:
        return {"encode": self.encode, "decode": self.decode}


def run_through(session: Session, loaded: Loaded, fit: Fit, clip: Tensor, handle: Any, label: str = "") -> Result:
    """Encode and decode `clip`, which is padded already.

    Args:
        session: of this rank.
        loaded: the VAE.
        fit: how the clip was padded.
        clip: (3, frames, height, width).
        handle: of the parallel VAE, None for the VAE itself.
        label: after the names of the stages.
    """
    vae, limits = loaded.vae, loaded.limits
    calls = fit.padded_frames if limits.per_frame else 1
    latents, encode = session.measured(
        f"encode{label}", lambda after: codec.encode(vae, limits, clip, after), handle, calls
    )
    calls = codec.decode_calls(vae, limits, latents)
    sample, decode = session.measured(
        f"decode{label}", lambda after: codec.decode(vae, limits, latents, after), handle, calls
    )
    sample = fit.crop(sample) if session.is_first else sample
    return Result(latents=latents, sample=sample, frames=codec.to_frames(sample), encode=encode, decode=decode)


def differences(one: Result, other: Result) -> dict[str, float]:
    """The largest differences, of latents also as a share of the largest latent."""
    latents = (one.latents.double() - other.latents.double()).abs().max().item()
    pixels = (one.sample.double() - other.sample.double()).abs().max().item()
    levels = int(np.abs(one.frames.astype(np.int16) - other.frames).max())
    largest = other.latents.double().abs().max().item()
    return {
        "latents": latents,
        "latents_relative": latents / largest if largest else 0.0,
        "pixels": pixels,
        "levels": levels,
    }


def to_source(source: NDArray[np.uint8], result: Result) -> tuple[str, float | None]:
    """The PSNR to the source, in words and for `--json`."""
    ratio = psnr(source, result.frames)
    return f"PSNR to the source: {decibel(ratio)}\n", finite(ratio)


def told(ranks: int, source: NDArray[np.uint8], parallel: Result, alone: Result) -> tuple[str, dict[str, Any]]:
    """What `--compare` prints, and the same for `--json`."""
    found = differences(parallel, alone)
    return text(ranks, source, parallel, alone, found), as_document(source, alone, found)


def text(ranks: int, source: NDArray[np.uint8], parallel: Result, alone: Result, found: dict[str, float]) -> str:
    """The table that `--compare` prints."""
    rows = [("", f"{ranks} rank{'s' * (ranks != 1)}", "un-parallel", "speed-up")]
    for name in ("encode", "decode"):
        mine, other = getattr(parallel, name).seconds, getattr(alone, name).seconds
        rows.append((name, f"{mine:.2f} s", f"{other:.2f} s", f"{other / mine:.2f}x"))
    near, far = decibel(psnr(source, parallel.frames)), decibel(psnr(source, alone.frames))
    rows.append(("PSNR to the source", near, far, ""))
    return (
        table(rows)
        + "largest difference between the two\n"
        + f"  latents  {found['latents']:.2e}  ({found['latents_relative']:.1e} of the largest latent)\n"
        + f"  pixels   {found['pixels']:.2e}  (of -1 to 1; {found['levels']:.0f} of 255 levels)\n"
    )


def as_document(source: NDArray[np.uint8], alone: Result, found: dict[str, float]) -> dict[str, Any]:
    """For `--json`."""
    seconds = {"encode": alone.encode.seconds, "decode": alone.decode.seconds}
    return {"differences": found, "unparallel": {"psnr": finite(psnr(source, alone.frames)), "seconds": seconds}}
