"""Clips in and out, with progress and notes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from halovae import media
from halovae.cli.session import Session


def read_clip(
    session: Session, source: Path, frames: media.FrameRange | None, height: int | None, width: int | None
) -> media.Clip:
    """Read on every rank: each needs the clip, and decoding it costs less than sending it."""
    count = frames.stop - frames.start if frames is not None and frames.stop is not None else None
    clip = session.together(
        "read",
        lambda advance: media.read(source, frames=frames, height=height, width=width, advance=advance),
        count,
    )
    for note in clip.notes:
        session.stages.note(f"{source}: {note}")
    return clip


def write_clip(
    session: Session, output: Path, frames: media.Frames, fps: Fraction, crf: int | None = None,
    times: Sequence[int] = (),
) -> None:  # fmt: skip
    """Write on this rank alone."""
    with session.stages.stage("write", len(frames)) as advance:
        notes = media.write(output, frames, fps, advance, crf, times)
    for note in notes:
        session.stages.note(f"{output}: {note}")
