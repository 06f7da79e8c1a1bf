"""`--compare` in tile mode: how far tiles are from the un-tiled result, next to exact mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from halovae.app.clip_files import lossy_words
from halovae.app.comparison import GATHER, ClipResult, Told, allowed_l2, differences, run_through
from halovae.app.session import Loaded, Session
from halovae.app.tables import Row, counted, mebibytes, table
from halovae.base.errors import NotExactError
from halovae.base.replaced import replaced
from halovae.calls.target import Target
from halovae.evaluation.numbers import decibel, finite
from halovae.evaluation.scores import psnr
from halovae.media import Film
from halovae.media.vae_limits import Fit


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far a result is from the un-tiled one of one rank."""

    psnr: float
    largest: float
    """Difference of pixels of -1 to 1."""


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

    def gap(self, result: ClipResult) -> Gap | None:
        if self.whole is None:
            return None
        largest = (result.kept.float() - self.whole.kept.float()).abs().max().item()
        return Gap(psnr=psnr(result.frames, self.whole.frames), largest=largest)


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


def told(session: Session, ways: Ways, peak: int | None, lost: str) -> Told:
    """What is said of a run in tiles, next to the other ways.

    Args:
        session: of the first rank.
        ways: what was run.
        peak: bytes, the most that any rank took for its tiles.
        lost: what writing changes the pixels by, see `clip_files.loss`.
    """
    several = counted(session.group.size, "rank")
    rows = _rows(several, ways, peak)
    same = "same bits" if ways.same_bits else f"other bits, by up to {_apart(ways):.1e}"
    text = (
        table(rows)
        + ("exact mode refuses this VAE\n" if ways.exact is None else "")
        + f"tiles on {several} against the VAE's own tiles on one rank: {same}\n"
        + (f"the file is {lossy_words(lost)}\n" if lost else "")
    )
    numbers = _as_document(ways) | {"psnr": finite(ways.tiles.psnr), "peak_memory": peak}
    numbers["passed"] = passed = ways.same_bits or (session.device.type != "cpu" and _is_rounding(session, ways))
    verdict = f"Tiles on {several} against the VAE's own tiles on one rank: {same}."
    return Told(text=text, rows=rows, numbers=numbers, passed=passed, verdict=verdict)


@contextmanager
def _tiling(vae: Any, on: bool) -> Iterator[None]:
    with replaced(vae, "use_tiling", on) if "use_tiling" in vars(vae) else nullcontext():
        yield


def _rows(several: str, ways: Ways, peak: int | None) -> list[Row]:
    results = {f"tile, {several}": ways.tiles, "tile, one rank": ways.own, f"exact, {several}": ways.exact}
    results["un-tiled, one rank"] = ways.whole
    found = {name: result for name, result in results.items() if result is not None}
    gaps = [ways.gap(result) for result in found.values()]
    peaks = [max((half.peak_memory or 0 for half in result.halves.values()), default=0) for result in found.values()]
    peaks[0] = peak or 0
    rows: list[Row] = [
        ("", *found),
        ("encode", *(f"{result.encode.seconds:.2f} s" for result in found.values())),
        ("decode", *(f"{result.decode.seconds:.2f} s" for result in found.values())),
        ("peak memory of a rank", *(mebibytes(bytes) if bytes else "" for bytes in peaks)),
        ("PSNR to the source", *(decibel(result.psnr) for result in found.values())),
    ]
    if ways.whole is not None:
        known = [gap for gap in gaps if gap is not None]
        rows += [
            ("PSNR to un-tiled", *(decibel(gap.psnr) for gap in known)),
            ("largest difference", *(f"{gap.largest:.1e}" for gap in known)),
        ]
    return rows


def _is_rounding(session: Session, ways: Ways) -> bool:
    """Whether tiles differ as they do where several go through the network together, as on accelerators."""
    found = differences(ways.tiles, ways.own)
    return max(found["latents_l2"], found["pixels_l2"]) <= allowed_l2(session)


def _apart(ways: Ways) -> float:
    return (ways.tiles.kept.double() - ways.own.kept.double()).abs().max().item()


def _as_document(ways: Ways) -> dict[str, Any]:
    results = {"tile": ways.tiles, "own_tiles": ways.own, "exact": ways.exact, "untiled": ways.whole}
    return {
        "same_bits": ways.same_bits,
        "ways": {name: _way(ways, result) for name, result in results.items() if result is not None},
    }


def _way(ways: Ways, result: ClipResult) -> dict[str, Any]:
    gap = ways.gap(result)
    distances = {} if gap is None else vars(gap)
    return {
        "seconds": {"encode": result.encode.seconds, "decode": result.decode.seconds},
        "psnr": finite(result.psnr),
        "to_untiled": {name: finite(value) for name, value in distances.items()},
    }
