"""`--compare`: the same clip through the VAE as it is on one rank, and how far the two results are apart.

Where the ranks ran tiles, also next to the VAE's own tiles on one rank, and to exact mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae.app import clip_files
from halovae.app.clip_files import Take, lossy_words
from halovae.app.session import Half, Loaded, Session
from halovae.app.tables import Row, mebibytes, seconds_table, table
from halovae.base.errors import NotExactError, counted
from halovae.base.options import HALVES, Gather
from halovae.base.replaced import replaced
from halovae.calls.target import Target
from halovae.calls.verify import TOLERANCE, distance
from halovae.evaluation.scores import PEAK, bound, decibel, finite, psnr
from halovae.media import Film, codec
from halovae.media.vae_limits import Fit

GATHER: Gather = {"encode": "all", "decode": "first"}
"""Decoding takes whole latents on every rank; what comes out is written by one."""


BEFORE = "before rounding to 8 bits and writing"


@dataclass(kw_only=True)
class ClipResult:
    """One way of a clip through the VAE. Whoever knows the peak memory of all ranks, or the PSNR, sets it."""

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
    def seconds(self) -> dict[str, float]:
        return {name: half.seconds for name, half in self.halves.items()}

    @cached_property
    def peak_memory(self) -> int | None:
        """Bytes on a rank, at the most; None where the system can't tell."""
        return max(half.peak_memory or 0 for half in self.halves.values()) or None

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
            take(codec.frames_of(piece))
        if keep:
            if sample is None:
                sample = piece.new_empty((piece.shape[0], fit.frames, *piece.shape[2:]))
            sample[:, count : count + piece.shape[1]] = piece
            count += piece.shape[1]

    decode = clip_files.decode(session, loaded, fit, latents, handle, taken, label)
    return ClipResult(film=film, latents=latents, sample=sample, encode=encode, decode=decode)


def told(session: Session, result: ClipResult, alone: ClipResult | None, lost: str) -> Told:
    """What is said of a run, next to one rank alone where that ran too.

    Args:
        lost: what writing changes the pixels by, see `clip_files.loss`.
    """
    ranks, peak = counted(session.group.size, "rank"), result.peak_memory
    numbers: dict[str, Any] = {"psnr": finite(result.psnr), "peak_memory": peak}
    if alone is None:
        memory = f"peak memory of a rank: {mebibytes(peak)}\n" if peak else ""
        text = f"{seconds_table(result.halves)}{memory}PSNR to the source: {decibel(result.psnr)}\n"
        return Told(text=text, rows=_rows({ranks: result}), numbers=numbers)
    gains = {half: f"{alone.seconds[half] / result.seconds[half]:.2f}x as fast" for half in HALVES}
    if peak and alone.peak_memory:
        gains[_PEAK] = f"{peak / alone.peak_memory:.2f}x as much"
    rows = [(*row, gains.get(row[0], "")) for row in _rows({ranks: result, "one rank": alone})]
    found = differences(result, alone)
    allowed = allowed_l2(session)
    passed = max(found["latents_l2"], found["pixels_l2"]) <= allowed
    rounding = f"up to rounding of {session.dtype_words}"
    levels = found["pixels"] * PEAK / 2
    unit = "of one level" if levels < 0.9 else "level" if bound(levels) == "1" else "levels"
    near = f"no pixel differs by more than {bound(levels)} {unit} of 255" if levels else "no pixel differs"
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
    one_rank = {
        "psnr": finite(alone.psnr),
        "seconds": alone.seconds,
        "peak_memory": {name: half.peak_memory for name, half in alone.halves.items()},
    }
    numbers |= {"allowed_l2": allowed, "passed": passed, "one_rank": one_rank}
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


def in_8_bits(found: dict[str, float], count: int) -> str:
    """What `differences` leaves of so many values when they are rounded."""
    if not found["values_off"]:
        return "in 8 bits all values are equal"
    most = counted(int(found["levels"]), "level")
    return f"in 8 bits {found['values_off']:,} of {count:,} values differ, by {most} at most"


def _rows(ways: Mapping[str, ClipResult]) -> list[Row]:
    """Time, memory and quality of each way."""
    results = list(ways.values())
    rows: list[Row] = [("", *ways)]
    rows += [(half, *(f"{way.seconds[half]:.2f} s" for way in results)) for half in HALVES]
    if results[0].peak_memory:
        rows.append((_PEAK, *(mebibytes(way.peak_memory) if way.peak_memory else "" for way in results)))
    return [*rows, ("PSNR to the source", *(decibel(way.psnr) for way in results))]


_PEAK = "peak memory of a rank"


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ways:
    """One clip's ways through the VAE; those that it refuses are missing."""

    tiles: ClipResult
    """On the ranks."""
    own: ClipResult
    """The VAE's own tiles, on one rank."""
    exact: ClipResult | None
    whole: ClipResult | None
    """Without tiles, on one rank."""

    @property
    def same_bits(self) -> bool:
        """Whether tiles on ranks and the VAE's own on one rank give the same, latents and pixels."""
        return torch.equal(self.tiles.latents, self.own.latents) and torch.equal(self.tiles.kept, self.own.kept)

    def gap(self, result: ClipResult) -> dict[str, float]:
        """How far a result is from the un-tiled one: PSNR, and the largest difference of pixels of -1 to 1."""
        if self.whole is None:
            return {}
        largest = (result.kept.float() - self.whole.kept.float()).abs().max().item()
        return {"psnr": psnr(result.frames, self.whole.frames), "largest": largest}


def run_exact(session: Session, loaded: Loaded, fit: Fit, film: Film) -> ClipResult | None:
    """The clip in exact mode, on all ranks; None where exact mode refuses the VAE."""
    if Target(loaded.vae).tiles_only:
        return None
    try:
        with _tiling(loaded.vae, False), session.parallel(loaded.vae, mode="exact", gather=GATHER) as handle:
            return run_through(session, loaded, fit, film, handle, " exact")
    except NotExactError:
        return None


def run_rest(
    session: Session, loaded: Loaded, fit: Fit, film: Film, tiles: ClipResult, exact: ClipResult | None
) -> Ways:  # fmt: skip
    """Run the rest of the ways, on this rank alone."""
    with _tiling(loaded.vae, True):
        own = run_through(session, loaded, fit, film, None, " own tiles")
    whole = None
    try:
        with _tiling(loaded.vae, False):
            whole = run_through(session, loaded, fit, film, None, " un-tiled")
    except NotImplementedError as error:
        session.stages.note(f"there is no un-tiled result to compare with: {error}")
    return Ways(tiles=tiles, own=own, exact=exact, whole=whole)


def told_of_tiles(session: Session, ways: Ways, lost: str) -> Told:
    """As `told` of a run in tiles, next to the other ways."""
    several = counted(session.group.size, "rank")
    results = {
        f"tile, {several}": ("tile", ways.tiles),
        "tile, one rank": ("own_tiles", ways.own),
        f"exact, {several}": ("exact", ways.exact),
        "un-tiled, one rank": ("untiled", ways.whole),
    }
    found = {title: (name, result) for title, (name, result) in results.items() if result is not None}
    rows = _rows({title: result for title, (_, result) in found.items()})
    gaps = [ways.gap(result) for _, result in found.values()]
    if ways.whole is not None:
        rows.append(("PSNR to un-tiled", *(decibel(gap["psnr"]) for gap in gaps)))
        rows.append(("largest difference", *(f"{gap['largest']:.1e}" for gap in gaps)))
    apart = differences(ways.tiles, ways.own)
    same = "same bits" if ways.same_bits else f"other bits, by up to {apart['pixels']:.1e}"
    text = (
        table(rows)
        + ("exact mode refuses this VAE\n" if ways.exact is None else "")
        + f"tiles on {several} against the VAE's own tiles on one rank: {same}\n"
        + (f"the file is {lossy_words(lost)}\n" if lost else "")
    )
    # On accelerators several tiles go through the network together, which rounds otherwise.
    is_rounding = max(apart["latents_l2"], apart["pixels_l2"]) <= allowed_l2(session)
    passed = ways.same_bits or (session.device.type != "cpu" and is_rounding)
    numbers = {
        "same_bits": ways.same_bits,
        "ways": {
            name: {
                "seconds": result.seconds,
                "psnr": finite(result.psnr),
                "to_untiled": {what: finite(value) for what, value in gap.items()},
            }
            for (name, result), gap in zip(found.values(), gaps, strict=True)
        },
        "psnr": finite(ways.tiles.psnr),
        "peak_memory": ways.tiles.peak_memory,
        "passed": passed,
    }
    verdict = f"Tiles on {several} against the VAE's own tiles on one rank: {same}."
    return Told(text=text, rows=rows, numbers=numbers, passed=passed, verdict=verdict)


@contextmanager
def _tiling(vae: Any, on: bool) -> Iterator[None]:
    with replaced(vae, "use_tiling", on) if "use_tiling" in vars(vae) else nullcontext():
        yield
