"""Clips in and out of a run: read and written while they are worked on, with progress and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halovae import media
from halovae.app.session import Advance, Half, Loaded, Session
from halovae.base.errors import HalovaeError
from halovae.base.options import Half as HalfName
from halovae.media import codec, models
from halovae.media.latents_file import LatentsInfo, scaling_of
from halovae.media.vae_limits import Fit, Limits

Take = Callable[[media.Frames], None]


def open_clip(
    session: Session, source: Path, frames: media.FrameRange | None, height: int | None, width: int | None
) -> media.Film:
    """Look through a clip on every rank: each needs its frames, and decoding them costs less than sending them."""
    count = frames.stop - frames.start if frames is not None and frames.stop is not None else None

    def step(advance: Advance) -> media.Film:
        session.source = models.find(session.options.model)  # A clip may take long: what is wrong is told before it.
        return media.Film(source, frames=frames, height=height, width=width, advance=advance)

    film = session.together("read", step, count)
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


@dataclass(frozen=True, kw_only=True)
class Coder:
    """A VAE, on this rank alone or on all, that encodes and decodes clips while they are read and written."""

    session: Session
    vae: Any
    limits: Limits
    dtypes: Mapping[HalfName, torch.dtype]
    """What each half gets."""
    streams: Mapping[HalfName, Callable[..., Any]]
    """`encode_stream` and `decode_stream` of the VAE's handle, where there is one."""
    agree: Callable[[HalovaeError | None], None]
    """Gets what went wrong on this rank, if anything did, and then raises on all."""
    after: Callable[[], None] = lambda: None
    """Called after each call of the VAE, which may be more often."""

    def frames(self, film: media.Film, fit: Fit) -> Iterator[Tensor]:
        """A clip as `encode` takes it."""
        return codec.padded(film, fit, self.dtypes["encode"], self.session.device)

    def encode(
        self, frames: Iterator[Tensor], fit: Fit, take: Callable[[Tensor], None], at_once: int = codec.LONG
    ) -> None:
        """Encode a clip, whose frames are read meanwhile. Latents are handed on as soon as they are final.

        Args:
            take: gets the next latents, as `codec.encode_pieces` gives them. What it raises, all ranks raise.
            at_once: as of `codec.encode_pieces`.
        """
        stream = self.streams.get("encode")
        pieces = codec.encode_pieces(self.vae, self.limits, frames, fit.padded_frames, self.after, stream, at_once)
        with torch.inference_mode(), closing(pieces):
            for piece in pieces:
                self.agree(_failure(take, piece))
                del piece

    def decode(self, latents: Tensor, fit: Fit, take: Callable[[Tensor], None]) -> None:
        """Decode a clip, and let the first rank have its frames as soon as they are final.

        Args:
            take: gets the next frames, (3, frames, height, width) of -1 to 1, cropped. What it raises, all ranks raise.
        """
        count, left = 0, codec.decode_calls(self.vae, self.limits, latents)

        def place(part: Tensor) -> Tensor:
            return part.to(self.session.device, self.dtypes["decode"])

        def given(piece: Tensor) -> None:
            fit.check(fit.padded_frames, *piece.shape[2:])
            cropped = fit.crop_piece(piece, count)
            if cropped.shape[1]:
                take(cropped)

        def after_call() -> None:
            nonlocal left
            self.after()
            left -= 1
            is_over = self.session.is_first and not left
            self.agree(_failure(fit.check, count, fit.padded_height, fit.padded_width) if is_over else None)

        pieces = codec.decode_pieces(self.vae, self.limits, latents, after_call, self.streams.get("decode"), place)
        with torch.inference_mode(), closing(pieces):
            for piece in pieces:
                self.after()
                if self.session.is_first and (problem := _failure(given, piece)) is not None:
                    pieces.close()  # Which ends the call on the other ranks, too.
                    self.agree(problem)
                count += piece.shape[1]
                del piece


def encode(
    session: Session, loaded: Loaded, fit: Fit, film: media.Film, handle: Any, take: Callable[[Tensor], None],
    label: str = "",
) -> Half:  # fmt: skip
    """`Coder.encode`, with progress and an account of it.

    Args:
        handle: of the parallel VAE, on every rank; None for the VAE itself, on this rank alone.
        label: after the name of the stage.
    """
    with session.measured(f"encode{label}", handle, fit.padded_frames) as (half, advance, after):
        coder = _coder(session, loaded, handle, after)
        coder.encode(_read(coder.frames(film, fit), half, advance, after), fit, take)
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
    """`Coder.decode`, with progress and an account of it; handle and label as for `encode`."""
    with session.measured(f"decode{label}", handle, fit.frames) as (half, advance, after):

        def taken(frames: Tensor) -> None:
            take(frames)
            advance(frames.shape[1])

        _coder(session, loaded, handle, after).decode(latents, fit, taken)
    return half


def _coder(session: Session, loaded: Loaded, handle: Any, after: Callable[[], None]) -> Coder:
    streams: dict[HalfName, Callable[..., Any]] = {}
    if handle is not None:
        streams = {"encode": handle.encode_stream, "decode": handle.decode_stream}
    agree = _raise if handle is None else session.agree
    return Coder(
        session=session, vae=loaded.vae, limits=loaded.limits, dtypes=session.dtypes, streams=streams, agree=agree,
        after=after,
    )  # fmt: skip


def latents_info(model: str, vae: Any, film: media.Film, fit: Fit) -> LatentsInfo:
    """What is to be known of the latents of a clip."""
    return LatentsInfo(
        model=model,
        model_class=type(vae).__name__,
        scaling=scaling_of(vae.config),
        fps=film.pace.fps,
        times=film.pace.times,
        **vars(fit),
    )


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
