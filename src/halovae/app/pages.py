"""`--report`: from what a command has found to the report's page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halovae.app.clip_files import lossy_words
from halovae.app.comparison import BEFORE, differences, in_8_bits
from halovae.app.tables import clip_line, described
from halovae.base import timeline
from halovae.base.errors import counted
from halovae.base.timeline import Span, Timeline
from halovae.evaluation import CutLines, Frames, compare_clips
from halovae.evaluation.report import ClipSection, Report, lanes
from halovae.evaluation.scores import decibel
from halovae.media.vae_limits import Fit
from halovae.tiles.tile_settings import TileSettings

if TYPE_CHECKING:
    from halovae.app.comparison import ClipResult, Told
    from halovae.app.session import Loaded, Session


@contextmanager
def recorded(session: Session) -> Iterator[Timeline]:
    """Within it, what this rank does is kept for the timeline. Called on every rank."""
    # They begin at one moment, so that their times can be laid side by side.
    session.group.all_gather_object(None)
    with timeline.recording() as found:
        yield found


def borders(vae: Any, handle: Any, ratio: int, fit: Fit) -> tuple[CutLines, str]:
    """Where the last call cut the picture, in pixels, and what these borders are called; nothing where one rank ran
    it."""
    size = fit.height, fit.width
    if handle is None or handle.last is None:
        return CutLines(), ""
    if handle.last.mode == "tile":
        tiles = TileSettings.of(vae)
        if tiles is None:
            return CutLines(), ""
        (height, width), (down, across) = tiles.size, tiles.overlap
        return CutLines.every((height - down, width - across), size, tiles.overlap), "tile borders"
    rows, columns = (tuple(bound * ratio for bound in bounds) for bounds in handle.last.bounds)
    return CutLines(rows=rows, columns=columns).inside(size), "shard borders"


def roundtrip_report(
    session: Session, loaded: Loaded, fit: Fit, handle: Any, result: ClipResult, alone: ClipResult | None, told: Told,
    spans: Sequence[Sequence[Span]], output: str, lost: str, words: Sequence[str],
) -> Report:  # fmt: skip
    """The report of `halovae roundtrip`: of a clip through the ranks and, if that was asked for, through one alone.

    Args:
        handle: of the parallel VAE; None where one rank ran it as it is.
        told: what the terminal says.
        spans: the timeline of every rank.
        output: name of the file.
        lost: what writing it changes the pixels by, see `clip_files.loss`.
        words: of the command line.
    """
    film = result.film
    cut = borders(loaded.vae, handle, loaded.limits.ratio, fit)
    ranks = counted(session.group.size, "rank")
    kept = _section(
        "Result against source",
        f"What the VAE keeps of the clip, before {output} was written.",
        ("Source", "Result"),
        film,
        result.frames,
        cut,
    )
    sections = [kept]
    if alone is not None:
        tiles = "in tiles " * ("tile" in (result.encode.mode, result.decode.mode))
        text = (
            "One rank: the VAE as diffusers runs it, un-tiled, with the same clip, weights and precision. "
            f"Both are compared {BEFORE} {output}; {in_8_bits(differences(result, alone), result.frames.size)}."
        )
        apart = _section(
            f"{ranks} {tiles}against one rank", text, ("One rank", f"{ranks} {tiles}".strip()),
            _levels(alone.kept), _levels(result.kept), cut,
        )  # fmt: skip
        sections = [apart, kept]
    seconds, found_lanes = lanes(spans)
    facts = {
        "Clip": clip_line(fit, film.pace.fps),
        "VAE": described(session, loaded, result.encode),
        "File": f"{output}, {lossy_words(lost)}" if lost else f"{output}, which keeps every pixel",
    }
    costs_text = memory_words(session.device)
    if alone is not None and session.group.size > 1:
        costs_text += (
            " One rank is the VAE as diffusers runs it. halovae's operators are faster than diffusers', so that "
            f"{ranks} can be more than {session.group.size} times as fast."
        )
    return Report(
        title=f"{film.path.name} through {loaded.source.model} on {ranks}",
        verdict=f"{told.verdict} PSNR to the source is {decibel(kept.found.psnr)}.".strip(),
        passed=told.passed,
        facts=facts,
        costs=told.rows,
        costs_text=costs_text,
        clips=sections,
        seconds=seconds,
        lanes=found_lanes,
        command=command(words),
    )


def memory_words(device: torch.device) -> str:
    if device.type == "cpu":
        return "Peak memory is that of a whole process, with Python, libraries and weights."
    return f"Peak memory is what torch held at most on a rank's {device.type} device."


def _section(
    title: str, text: str, names: tuple[str, str], reference: Frames, result: Frames, cut: tuple[CutLines, str]
) -> ClipSection:
    """Compare, with seams at the borders of the cut."""
    grid, grid_name = cut
    found = compare_clips(reference, result, grid)
    return ClipSection(
        title=title, text=text, reference_name=names[0], result_name=names[1], reference=reference, result=result,
        found=found, borders=grid, borders_name=grid_name,
    )  # fmt: skip


def command(words: Sequence[str]) -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["halovae", *words])


def _levels(sample: Tensor) -> NDArray[np.float32]:
    """(3, frames, height, width) of -1 to 1 to (frames, height, width, 3) of 0 to 255, not rounded."""
    levels = (sample.to(torch.float32).clamp(-1, 1) + 1) * 127.5
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
