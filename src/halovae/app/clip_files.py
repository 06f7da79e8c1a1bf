"""Clips in and out, with progress and notes; and two files to compare, of one kind and one size, or trimmed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from halovae import media
from halovae.app.session import Session
from halovae.base.errors import InputError
from halovae.media import latents_file
from halovae.media.latents_file import LatentsInfo


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


_ROUNDING = 5e-4
"""Rates nearer than this may be one rate: some formats keep times in milliseconds. 24 and 24000/1001 are 1e-3 apart."""


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """Two things of one size."""

    notes: tuple[str, ...]
    """What was left out to get there, one line each."""


@dataclass(frozen=True, kw_only=True)
class Clips(Trimmed):
    """Two clips, or images, of one size."""

    reference: media.Film
    result: media.Film
    count: int
    """Frames of each."""
    size: tuple[int, int]
    """Height and width."""
    lost: str
    """What codecs have to do with the difference, in a sentence; nothing where neither file loses anything."""


@dataclass(frozen=True, kw_only=True)
class LatentsPair(Trimmed):
    """Two latents of one shape."""

    reference: Tensor
    result: Tensor
    info: LatentsInfo
    """Of the reference."""


def is_latents(path: Path) -> bool:
    return path.suffix.lower() == latents_file.SUFFIX


def read_clips(one: Path, other: Path, *, trim: bool, advance: Callable[[], None] = lambda: None) -> Clips:
    """Look through two videos or images; of each, one frame at a time is in memory, then and later.

    Args:
        one: the reference.
        other: the result.
        trim: cut both to what they have in common; sizes around the centre.
        advance: called after each frame.

    Raises:
        InputError: a file can't be read; or they differ in length, size or rate, and `trim` is not set.
    """
    reference, result = media.Film(one, advance), media.Film(other, advance)
    lengths = reference.count, result.count
    rates = reference.pace.fps, result.pace.fps
    if abs(rates[0] / rates[1] - 1) < _ROUNDING:
        rates = rates[0], rates[0]
    sizes = [f"{film.size[1]}x{film.size[0]}" for film in (reference, result)]
    differing = [
        f"{what} {first} and {second}"
        for what, first, second in (
            ("frames", *lengths),
            ("size", *sizes),
            ("rate", *rates),
        )
        if first != second
    ]
    if differing and not trim:
        raise InputError(f"{one} and {other} differ: {', '.join(differing)}: use --trim to compare what they share")
    count, height, width = map(min, (reference.count, *reference.size), (result.count, *result.size))
    for film in (reference, result):
        film.trim(count, height, width)
    notes = tuple(f"trimmed: {text}" for text in differing)
    lossy = {path.name: film.lossy for path, film in ((one, reference), (other, result)) if film.lossy}
    return Clips(reference=reference, result=result, count=count, size=(height, width), lost=_lost(lossy), notes=notes)


def _lost(lossy: dict[str, str]) -> str:
    if not lossy:
        return ""
    files = " and ".join(f"{name} ({codec})" for name, codec in lossy.items())
    return (
        f"What the codec of {files} loses is in these numbers too: files differ by more than what was computed. "
        "To see that alone, write them with --lossless."
    )


def read_latents(one: Path, other: Path, *, trim: bool) -> LatentsPair:
    """Read two latents files.

    Args:
        one: the reference.
        other: the result.
        trim: cut both to what they have in common, from the start of each dimension.

    Raises:
        InputError: a file can't be read; they differ in shape and `trim` is not set; or no trimming makes them alike.
    """
    (reference, info), (result, _) = latents_file.load(one), latents_file.load(other)
    shapes = [tuple(tensor.shape) for tensor in (reference, result)]
    if reference.ndim != result.ndim or reference.shape[1] != result.shape[1]:
        raise InputError(f"{one} and {other} hold latents of shapes {shapes[0]} and {shapes[1]}: not of one VAE")
    notes: tuple[str, ...] = ()
    if shapes[0] != shapes[1]:
        if not trim:
            raise InputError(
                f"{one} and {other} differ: shapes {shapes[0]} and {shapes[1]}: use --trim to compare what they share"
            )
        notes = (f"trimmed: shapes {shapes[0]} and {shapes[1]}",)
        shared = tuple(slice(min(pair)) for pair in zip(*shapes, strict=True))
        reference, result = reference[shared], result[shared]
    return LatentsPair(reference=reference, result=result, info=info, notes=notes)
