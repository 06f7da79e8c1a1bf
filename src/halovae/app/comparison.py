"""`--compare`: the same clip through the VAE as it is on one rank, and how far the two results are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halovae.app.clip_files import lossy_words
from halovae.app.session import Half, Loaded, Session
from halovae.app.tables import Row, counted, mebibytes, seconds_table, table
from halovae.base.options import Gather
from halovae.calls.verify import TOLERANCE, distance
from halovae.evaluation.numbers import bound, decibel, finite
from halovae.evaluation.scores import PEAK, psnr
from halovae.media import codec
from halovae.media.vae_limits import Fit

GATHER: Gather = {"encode": "all", "decode": "first"}
"""Decoding takes whole latents on every rank; what comes out is written by one."""


BEFORE = "before rounding to 8 bits and writing"


@dataclass(frozen=True, kw_only=True)
class ClipResult:
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


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is said of a run, on the terminal, in files and on the report's page."""

    text: str
    """For the terminal."""
    rows: list[Row]
    """Its table, for the page."""
    numbers: dict[str, Any]
    """For `--json`."""
    passed: bool | None = None
    """Whether the result is the one that it has to be; None where nothing was compared."""
    verdict: str = ""
    """The same in a sentence."""


def run_through(session: Session, loaded: Loaded, fit: Fit, clip: Tensor, handle: Any, label: str = "") -> ClipResult:
    """Encode and decode `clip`, which is padded already.

    Args:
        clip: (3, frames, height, width).
        handle: of the parallel VAE, None for the VAE itself.
        label: after the names of the stages.
    """
    vae, limits, dtypes = loaded.vae, loaded.limits, session.dtypes
    calls = fit.padded_frames if limits.per_frame else 1
    latents, encode = session.measured(
        f"encode{label}", lambda after: codec.encode(vae, limits, clip.to(dtypes["encode"]), after), handle, calls
    )
    calls = codec.decode_calls(vae, limits, latents)
    sample, decode = session.measured(
        f"decode{label}", lambda after: codec.decode(vae, limits, latents.to(dtypes["decode"]), after), handle, calls
    )
    sample = fit.crop(sample) if session.is_first else sample
    return ClipResult(latents=latents, sample=sample, frames=codec.to_frames(sample), encode=encode, decode=decode)


def told(
    session: Session, source: NDArray[np.uint8], result: ClipResult, alone: ClipResult | None, peak: int | None,
    lost: str,
) -> Told:  # fmt: skip
    """What is said of a run, next to one rank alone where that ran too.

    Args:
        source: (frames, height, width, 3), levels of 0 to 255.
        peak: bytes, the most that any rank took.
        lost: what writing changes the pixels by, see `clip_files.loss`.
    """
    ranks = counted(session.group.size, "rank")
    rows = _rows(ranks, source, result, alone, peak)
    ratio = psnr(source, result.frames)
    numbers: dict[str, Any] = {"psnr": finite(ratio), "peak_memory": peak}
    if alone is None:
        text = seconds_table(result.halves) + memory_line(peak) + f"PSNR to the source: {decibel(ratio)}\n"
        return Told(text=text, rows=rows, numbers=numbers)
    found = differences(result, alone)
    allowed = allowed_l2(session)
    passed = max(found["latents_l2"], found["pixels_l2"]) <= allowed
    rounding = f"up to rounding of {session.dtype_words}"
    near = _near(found["pixels"] * PEAK / 2)
    text = (
        table(rows)
        + f"largest difference between the two, {BEFORE}\n"
        + f"  latents  {found['latents']:.2e}  ({found['latents_relative']:.1e} of the largest latent)\n"
        + f"  pixels   {found['pixels']:.2e}  (of -1 to 1; {near})\n"
        + f"{in_8_bits(found, result.frames.size)}\n"
        + f"{'passed: the same' if passed else 'FAILED: not the same'} {rounding} (relative L2 of latents "
        + f"{found['latents_l2']:.1e}, of pixels {found['pixels_l2']:.1e}; {allowed:.0e} is allowed)\n"
        + (f"the file is {lossy_words(lost)}\n" if lost else "")
    )
    same = "give the same result" if passed else "do not give the same result"
    verdict = f"{ranks} and one rank {same} {rounding}: {near}."
    numbers |= {"differences": {name: finite(value) for name, value in found.items()}}
    numbers |= {"allowed_l2": allowed, "passed": passed, "one_rank": _alone(source, alone)}
    return Told(text=text, rows=rows, numbers=numbers, passed=passed, verdict=verdict)


def differences(one: ClipResult, other: ClipResult) -> dict[str, float]:
    """The largest differences, of latents also as a share of the largest latent, and relative L2 distances."""
    latents = (one.latents.double() - other.latents.double()).abs().max().item()
    pixels = (one.sample.double() - other.sample.double()).abs().max().item()
    levels = np.abs(one.frames.astype(np.int16) - other.frames)
    largest = other.latents.double().abs().max().item()
    return {
        "latents": latents,
        "latents_relative": latents / largest if largest else 0.0,
        "latents_l2": distance(one.latents, other.latents),
        "pixels": pixels,
        "pixels_l2": distance(one.sample, other.sample),
        "levels": int(levels.max()),
        "values_off": int(np.count_nonzero(levels)),
    }


def allowed_l2(session: Session) -> float:
    """Relative L2 distance that rounding can make."""
    return max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in session.dtypes.values())


def memory_line(peak: int | None) -> str:
    return "" if peak is None else f"peak memory of a rank: {mebibytes(peak)}\n"


def _near(levels: float) -> str:
    if not levels:
        return "no pixel differs"
    most = bound(levels)
    unit = "of one level" if levels < 0.9 else "level" if most == "1" else "levels"
    return f"no pixel differs by more than {most} {unit} of 255"


def in_8_bits(found: dict[str, float], count: int) -> str:
    """What `differences` leaves of so many values when they are rounded."""
    if not found["values_off"]:
        return "in 8 bits all values are equal"
    most = counted(int(found["levels"]), "level")
    return f"in 8 bits {found['values_off']:,} of {count:,} values differ, by {most} at most"


def _rows(
    ranks: str, source: NDArray[np.uint8], result: ClipResult, alone: ClipResult | None, peak: int | None
) -> list[Row]:  # fmt: skip
    """Time, memory and quality; the last column tells how much faster and leaner the ranks are."""
    own_peak = None if alone is None else max(half.peak_memory or 0 for half in alone.halves.values()) or None
    rows: list[Row] = [("", ranks, "one rank", "")]
    for name, half in result.halves.items():
        other = None if alone is None else alone.halves[name].seconds
        gain = "" if other is None else f"{other / half.seconds:.2f}x as fast"
        rows.append((name, f"{half.seconds:.2f} s", "" if other is None else f"{other:.2f} s", gain))
    if peak is not None:
        share = "" if own_peak is None else f"{peak / own_peak:.2f}x as much"
        rows.append(("peak memory of a rank", mebibytes(peak), "" if own_peak is None else mebibytes(own_peak), share))
    far = "" if alone is None else decibel(psnr(source, alone.frames))
    rows.append(("PSNR to the source", decibel(psnr(source, result.frames)), far, ""))
    return rows if alone is not None else [row[:2] for row in rows]


def _alone(source: NDArray[np.uint8], alone: ClipResult) -> dict[str, Any]:
    return {
        "psnr": finite(psnr(source, alone.frames)),
        "seconds": {name: half.seconds for name, half in alone.halves.items()},
        "peak_memory": {name: half.peak_memory for name, half in alone.halves.items()},
    }
