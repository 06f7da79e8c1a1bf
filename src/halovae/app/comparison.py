"""`--compare`: the same clip through the VAE as it is on one rank, and how far the two results are apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halovae.app import clip_files
from halovae.app.clip_files import Take, lossy_words
from halovae.app.session import Half, Loaded, Session
from halovae.app.tables import Row, counted, mebibytes, seconds_table, table
from halovae.base.options import Gather
from halovae.calls.verify import TOLERANCE, distance
from halovae.evaluation.numbers import bound, decibel, finite
from halovae.evaluation.scores import PEAK, psnr
from halovae.media import Film, codec
from halovae.media.vae_limits import Fit

GATHER: Gather = {"encode": "all", "decode": "first"}
"""Decoding takes whole latents on every rank; what comes out is written by one."""


BEFORE = "before rounding to 8 bits and writing"


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """One way of a clip through the VAE."""

    film: Film
    """The source."""
    latents: Tensor
    sample: Tensor | None
    """(3, frames, height, width), cropped, not clamped; on the first rank, where it was to be kept."""
    encode: Half
    decode: Half

    @property
    def halves(self) -> dict[str, Half]:
        return {"encode": self.encode, "decode": self.decode}

    @property
    def kept(self) -> Tensor:
        assert self.sample is not None
        return self.sample

    @cached_property
    def frames(self) -> NDArray[np.uint8]:
        """In 8 bits."""
        return codec.to_frames(self.kept)

    @cached_property
    def psnr(self) -> float:
        """To the source."""
        return psnr(self.film, self.frames)


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


def run_through(
    session: Session, loaded: Loaded, fit: Fit, film: Film, handle: Any, label: str = "", *, keep: bool = True,
    take: Take | None = None,
) -> ClipResult:  # fmt: skip
    """Encode and decode a clip.

    Args:
        film: the clip.
        handle: of the parallel VAE, on every rank; None for the VAE itself, on this rank alone.
        label: after the names of the stages.
        keep: whether the first rank keeps what came out.
        take: gets the frames in 8 bits, on the first rank, as soon as they are final.
    """
    encoded: list[Tensor] = []
    encode = clip_files.encode(session, loaded, fit, film, handle, encoded.append, label)
    latents = codec.joined(loaded.limits, encoded)
    del encoded
    sample, count = None, 0

    def taken(piece: Tensor) -> None:
        nonlocal sample, count
        if take is not None:
            take(codec.Frames(piece))
        if keep:
            if sample is None:
                sample = piece.new_empty((piece.shape[0], fit.frames, *piece.shape[2:]))
            sample[:, count : count + piece.shape[1]] = piece
            count += piece.shape[1]

    decode = clip_files.decode(session, loaded, fit, latents, handle, taken, label)
    return ClipResult(film=film, latents=latents, sample=sample, encode=encode, decode=decode)


def told(
    session: Session, ratio: float, result: ClipResult, alone: ClipResult | None, peak: int | None, lost: str
) -> Told:
    """What is said of a run, next to one rank alone where that ran too.

    Args:
        result: of the ranks; kept where one rank alone ran too.
        peak: bytes, the most that any rank took.
        lost: what writing changes the pixels by, see `clip_files.loss`.
    """
    ranks = counted(session.group.size, "rank")
    rows = _rows(ranks, ratio, result, alone, peak)
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
    numbers |= {"allowed_l2": allowed, "passed": passed, "one_rank": _alone(alone)}
    return Told(text=text, rows=rows, numbers=numbers, passed=passed, verdict=verdict)


def differences(one: ClipResult, other: ClipResult) -> dict[str, float]:
    """The largest differences, of latents also as a share of the largest latent, and relative L2 distances."""
    latents = (one.latents.double() - other.latents.double()).abs().max().item()
    pixels = (one.kept.double() - other.kept.double()).abs().max().item()
    levels = np.abs(one.frames.astype(np.int16) - other.frames)
    largest = other.latents.double().abs().max().item()
    return {
        "latents": latents,
        "latents_relative": latents / largest if largest else 0.0,
        "latents_l2": distance(one.latents, other.latents),
        "pixels": pixels,
        "pixels_l2": distance(one.kept, other.kept),
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
    ranks: str, ratio: float, result: ClipResult, alone: ClipResult | None, peak: int | None
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
    far = "" if alone is None else decibel(alone.psnr)
    rows.append(("PSNR to the source", decibel(ratio), far, ""))
    return rows if alone is not None else [row[:2] for row in rows]


def _alone(alone: ClipResult) -> dict[str, Any]:
    return {
        "psnr": finite(alone.psnr),
        "seconds": {name: half.seconds for name, half in alone.halves.items()},
        "peak_memory": {name: half.peak_memory for name, half in alone.halves.items()},
    }
