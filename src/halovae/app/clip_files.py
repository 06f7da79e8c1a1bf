"""Clips in and out of a run: read and written while they are worked on, with progress and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from halovae import media
from halovae.app.session import Advance, Half, Loaded, Session
from halovae.base.errors import HalovaeError
from halovae.media import codec
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
    """Within it, the first rank writes a clip while its further frames are made; settings are those of `media.Writer`.

    Called on every rank. Yields what takes the next frames, on the first rank.

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
        handle: of the parallel VAE, on every rank; None for the VAE itself, on this rank alone.
        take: gets the next latents, as `codec.encode_pieces` gives them. What it raises, all ranks raise.
        label: after the name of the stage.
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
        handle: as for `encode`.
        take: gets the next frames, (3, frames, height, width) of -1 to 1, cropped. What it raises, all ranks raise.
        label: after the name of the stage.
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
