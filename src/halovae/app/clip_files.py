"""Clips in and out, with progress and notes; and two files to compare, of one kind and one size, or trimmed to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from halovae import media
from halovae.app.session import Advance, Half, Loaded, Session
from halovae.base.errors import HalovaeError, InputError
from halovae.media import codec, latents_file
from halovae.media.latents_file import LatentsInfo
from halovae.media.vae_limits import Fit

Take = Callable[[media.Frames], None]


def open_clip(
    session: Session, source: Path, frames: media.FrameRange | None, height: int | None, width: int | None
) -> media.Film:
    """Look through a clip on every rank: each needs its frames, and decoding them costs less than sending them."""
    count = frames.stop - frames.start if frames is not None and frames.stop is not None else None
    film = session.together(
        "read",
        lambda advance: media.Film(source, frames=frames, height=height, width=width, advance=advance),
        count,
    )
    for note in film.notes:
        session.stages.note(f"{source}: {note}")
    return film


@contextmanager
def writing(session: Session, output: Path, fps: Fraction, **settings: Any) -> Iterator[Take]:
    """Within it, the first rank writes a clip while its further frames are made. Called on every rank.

    Args:
        session: of this rank.
        output: as for `media.Writer`.
        fps: likewise.
        settings: likewise.

    Yields:
        What takes the next frames, as `media.write` does, on the first rank.

    Raises:
        InputError: at the end, on all ranks: the file can't be written.
    """
    with ExitStack() as stack:
        writer = None
        if session.is_first:
            writer = stack.enter_context(media.Writer(output, fps, **settings))

        def take(frames: media.Frames) -> None:
            if writer is not None:
                for frame in frames:
                    writer.put(frame)

        yield take
        problem = _failure(stack.close)
    session.agree(problem)
    for note in writer.notes if writer else ():
        session.stages.note(f"{output}: {note}")


def encode(
    session: Session, loaded: Loaded, fit: Fit, film: media.Film, handle: Any, take: Callable[[Tensor], None],
    label: str = "",
) -> Half:  # fmt: skip
    """Encode a clip, whose frames are read meanwhile. Latents are handed on as soon as they are final.

    Args:
        session: of this rank.
        loaded: the VAE.
        fit: how the clip is padded.
        film: the clip.
        handle: of the parallel VAE, on every rank; None for the VAE itself, on this rank alone.
        take: gets the next latents, as `codec.encode_pieces` gives them.
        label: after the name of the stage.

    Raises:
        HalovaeError: of `take`, on all ranks.
    """
    agree = _raise if handle is None else session.agree
    with session.measured(f"encode{label}", handle, fit.padded_frames) as (half, advance, after):
        frames = codec.padded(film, fit, session.dtypes["encode"], session.device)
        stream = None if handle is None else handle.encode_stream
        pieces = codec.encode_pieces(
            loaded.vae, loaded.limits, _read(frames, half, advance, after), fit.padded_frames, after, stream
        )
        with closing(pieces):
            for piece in pieces:
                agree(_failure(take, piece))
                del piece
    return half


def _read(frames: Iterator[Tensor], half: Half, advance: Advance, after: Callable[[], None]) -> Iterator[Tensor]:
    """Each counts when the next one is asked for; a call of the VAE may be over then. To read them is no encoding."""
    while True:
        started = time.perf_counter()
        frame = next(frames, None)
        half.read_seconds += time.perf_counter() - started
        if frame is None:
            return
        yield frame
        advance()
        after()


def decode(
    session: Session, loaded: Loaded, fit: Fit, latents: Tensor, handle: Any, take: Callable[[Tensor], None],
    label: str = "",
) -> Half:  # fmt: skip
    """Decode a clip, and let the first rank have its frames as soon as they are final.

    Args:
        session: of this rank.
        loaded: the VAE.
        fit: the sizes of the clip.
        latents: as `codec.decode` takes them.
        handle: of the parallel VAE, on every rank; None for the VAE itself, on this rank alone.
        take: gets the next frames, (3, frames, height, width) of -1 to 1, cropped.
        label: after the name of the stage.

    Raises:
        HalovaeError: of `take`, on all ranks.
    """
    vae, limits, count = loaded.vae, loaded.limits, 0
    left = codec.decode_calls(vae, limits, latents)
    agree = _raise if handle is None else session.agree

    def place(part: Tensor) -> Tensor:
        return part.to(session.device, session.dtypes["decode"])

    def given(piece: Tensor) -> None:
        fit.check(fit.padded_frames, *piece.shape[2:])
        cropped = fit.crop_piece(piece, count)
        if cropped.shape[1]:
            take(cropped)
            advance(cropped.shape[1])

    def after_call() -> None:
        nonlocal left
        after()
        left -= 1
        is_over = session.is_first and not left
        agree(_failure(fit.check, count, fit.padded_height, fit.padded_width) if is_over else None)

    with session.measured(f"decode{label}", handle, fit.frames) as (half, advance, after):
        stream = None if handle is None else handle.decode_stream
        with closing(codec.decode_pieces(vae, limits, latents, after_call, stream, place)) as pieces:
            for piece in pieces:
                after()
                if session.is_first and (problem := _failure(given, piece)) is not None:
                    pieces.close()  # Which ends the call on the other ranks, too.
                    agree(problem)
                count += piece.shape[1]
                del piece
    return half


def _failure(step: Callable[..., object], *given: Any) -> HalovaeError | None:
    try:
        step(*given)
    except HalovaeError as error:
        return error
    return None


def _raise(problem: HalovaeError | None) -> None:
    if problem is not None:
        raise problem


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
    reference, result = media.Film(one, advance=advance), media.Film(other, advance=advance)
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
    remedy = "use --trim to compare what they share"
    if sizes[0] != sizes[1]:  # A piece out of the middle of the larger one is another picture.
        remedy = "scale one of them, or use halovae roundtrip --compare, which compares at one size"
    if differing and not trim:
        raise InputError(f"{one} and {other} differ: {', '.join(differing)}: {remedy}")
    count, height, width = map(min, (reference.count, *reference.size), (result.count, *result.size))
    for film in (reference, result):
        film.trim(count, height, width)
    notes = tuple(
        f"{'cropped around the centre, not scaled' if text.startswith('size') else 'trimmed'}: {text}"
        for text in differing
    )
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
