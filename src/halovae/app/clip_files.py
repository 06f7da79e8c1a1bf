"""Clips in and out, with progress and notes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from halovae import media
from halovae.app.session import Session


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
    times: Sequence[int] = (), lossless: bool = False,
) -> None:  # fmt: skip
    """Write on this rank alone."""
    with session.stages.stage("write", len(frames)) as advance:
        notes = media.write(output, frames, fps, advance, crf, times, lossless)
    for note in notes:
        session.stages.note(f"{output}: {note}")


def loss(output: Path, crf: int | None = None, lossless: bool = False) -> str:
    """What writing changes the pixels by, in words; nothing where they are kept."""
    if lossless or output.suffix.lower() == ".png":
        return ""
    return f"H.264 at crf {media.CRF if crf is None else crf}"


def lossy_words(lost: str) -> str:
    """What a reader of a file has to know who compares it with another one."""
    return f"{lost}, which changes pixels: two files differ by more than what was computed, unless --lossless is given"
