"""`--report`: from what a command has found to the report's page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae import timeline
from halovae.cli.report import clip_line, described
from halovae.fit import Fit
from halovae.quality import ClipComparison, Frames, Gate, Grid, LatentComparison, compare_clips
from halovae.quality.numbers import decibel
from halovae.report import ClipSection, LatentSection, Report, lanes
from halovae.tile.settings import TileSettings
from halovae.timeline import Span, Timeline

if TYPE_CHECKING:
    from halovae.cli.compare import Result
    from halovae.cli.session import Loaded, Session
    from halovae.media import Clip


@contextmanager
def recorded(session: Session) -> Iterator[Timeline]:
    """Within it, what this rank does is kept for the timeline. Called on every rank."""
    # They begin at one moment, so that their times can be laid side by side.
    session.group.all_gather_object(None)
    with timeline.recording() as found:
        yield found


def borders(vae: Any, handle: Any, ratio: int, fit: Fit) -> tuple[Grid, str]:
    """Where the last call cut the picture, in pixels, and what these borders are called.

    Args:
        vae: the VAE.
        handle: of the parallel VAE after a decode; None where one rank ran it as it is.
        ratio: pixels per latent.
        fit: the sizes of the clip.
    """
    size = fit.height, fit.width
    if handle is None or handle.last is None:
        return Grid(), ""
    if handle.last.mode == "tile":
        tiles = TileSettings.of(vae)
        if tiles is None:
            return Grid(), ""
        (height, width), (down, across) = tiles.size, tiles.overlap
        return Grid.every((height - down, width - across), size, tiles.overlap), "tile borders"
    rows, columns = (tuple(bound * ratio for bound in bounds) for bounds in handle.last.bounds)
    return Grid(rows=rows, columns=columns).inside(size), "shard borders"


@dataclass(frozen=True, kw_only=True)
class Ways:
    """A clip, and what came of it in one way or two."""

    clip: Clip
    result: Result
    """Of the ranks."""
    alone: Result | None
    """Of one rank without any cut, if that was asked for."""
    handle: Any
    """Of the parallel VAE; None where one rank ran it as it is."""
    spans: Sequence[Sequence[Span]]
    """The timeline of every rank."""


def roundtrip_report(session: Session, loaded: Loaded, fit: Fit, ways: Ways, name: str, words: Sequence[str]) -> Report:
    """The report of `halovae roundtrip`.

    Args:
        session: of the first rank.
        loaded: the VAE.
        fit: the sizes of the clip.
        ways: what was done.
        name: of the clip.
        words: the command line.
    """
    clip, result, alone = ways.clip, ways.result, ways.alone
    cut = borders(loaded.vae, ways.handle, loaded.limits.ratio, fit)
    ranks = f"{session.group.size} rank{'s' * (session.group.size != 1)}"
    kept = _section(
        "Result against source",
        "What the VAE keeps of the clip.",
        ("Source", "Result"),
        clip.frames,
        result.frames,
        cut,
    )
    sections, verdict = [kept], f"PSNR to the source is {decibel(kept.found.psnr)}."
    if alone is not None:
        text = "The same clip, weights and precision on one rank without any cut; before rounding to 8 bits."
        apart = _section(
            f"{ranks} against un-parallel", text, ("Un-parallel", ranks),
            _levels(alone.sample), _levels(result.sample), cut,
        )  # fmt: skip
        most = f"{apart.found.largest:.2g} of 255 levels before rounding"
        sections, verdict = [apart, kept], f"{ranks} and the un-parallel VAE differ by at most {most}. {verdict}"
    seconds, found_lanes = lanes(ways.spans)
    facts = {
        "Clip": clip_line(fit, clip.fps),
        "Encode": f"{result.encode.seconds:.2f} s",
        "Decode": f"{result.decode.seconds:.2f} s",
        "VAE": described(session, loaded, result.encode),
    }
    return Report(
        title=f"{name} through {loaded.source.model} on {ranks}", verdict=verdict, facts=facts, clips=sections,
        seconds=seconds, lanes=found_lanes, command=command(words),
    )  # fmt: skip


def _section(
    title: str, text: str, names: tuple[str, str], reference: Frames, result: Frames, cut: tuple[Grid, str]
) -> ClipSection:
    """Compare, with seams at the borders of the cut."""
    grid, grid_name = cut
    found = compare_clips(reference, result, grid)
    return ClipSection(
        title=title, text=text, reference_name=names[0], result_name=names[1], reference=reference, result=result,
        found=found, borders=grid, borders_name=grid_name,
    )  # fmt: skip


def clips_report(
    one: Path, other: Path, reference: Frames, result: Frames, found: ClipComparison, gates: Sequence[Gate],
    words: Sequence[str],
) -> Report:  # fmt: skip
    """The report of two clips that `halovae compare` was given."""
    section = ClipSection(
        title=f"{other.name} against {one.name}",
        text="Every pixel of the two files as they decode, in 8-bit RGB.",
        reference_name=one.name,
        result_name=other.name,
        reference=reference,
        result=result,
        found=found,
        borders=found.grid,
        borders_name="given lines",
    )
    height, width = found.energy.shape
    facts = {"Frames": str(len(found.frames)), "Size": f"{width}x{height}"}
    same = "Identical in every level of every frame." if found.is_identical else f"PSNR is {decibel(found.psnr)}."
    verdict = _verdict(gates) or same
    return Report(
        title=section.title, verdict=verdict, facts=facts, clips=[section], gates=gates, command=command(words)
    )


def latents_report(
    one: Path, other: Path, found: LatentComparison, gates: Sequence[Gate], words: Sequence[str]
) -> Report:
    """The report of two latents files that `halovae compare` was given."""
    section = LatentSection(
        title=f"{other.name} against {one.name}", text="", reference_name=one.name, result_name=other.name, found=found
    )
    verdict = _verdict(gates) or f"The relative L2 distance is {found.relative_l2:.2e}."
    return Report(title=section.title, verdict=verdict, latents=[section], gates=gates, command=command(words))


def command(words: Sequence[str]) -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["halovae", *words])


def _verdict(gates: Sequence[Gate]) -> str:
    """Which gates failed, or that none did; nothing where there are none."""
    failed = [str(gate) for gate in gates if not gate.passed]
    if not gates:
        return ""
    return "; ".join(failed) + "." if failed else "All gates passed."


def _levels(sample: Tensor) -> NDArray[np.float32]:
    """(3, frames, height, width) of -1 to 1 to (frames, height, width, 3) of 0 to 255, not rounded."""
    levels = (sample.to(torch.float32).clamp(-1, 1) + 1) * 127.5
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
