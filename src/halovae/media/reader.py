"""Read a video or an image, by content and not by name, as 8-bit RGB frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from halovae.errors import InputError
from halovae.files import check_input, first_line
from halovae.media.images import image_notes, open_image, upright_rgb
from halovae.media.limits import MAX_CLIP_BYTES, MAX_FRAME_PIXELS, check_pixels
from halovae.media.options import FrameRange

Frame = NDArray[np.uint8]

_UNSPECIFIED_COLORSPACE = 2
_HDR = (16, 18)
"""The transfer functions PQ and HLG in ITU-T H.273."""
_EVEN = 0.01
"""How far the average rate may be from the finest one before the frames count as uneven."""
_SCALER = 0x200 | 0x2000 | 0x40000
"""SWS_LANCZOS, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND of libswscale: without the last two, chroma is repeated and not
interpolated, and pictures come out one level too dark (4 dB on the shipped clip)."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames in memory."""

    frames: Frame
    """(frames, height, width, 3), RGB."""
    fps: Fraction
    """Frames per second, 1 for an image."""
    source_size: tuple[int, int]
    """Height and width in the file, upright and with square pixels."""
    notes: tuple[str, ...] = ()
    """What of the file was not taken over, one line each."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself."""

    is_image: bool
    height: int
    width: int


def inspect(path: Path) -> Header:
    """Look at the header only.

    Raises:
        InputError: no readable image or video, or more pixels than `MAX_FRAME_PIXELS`.
    """
    check_input(path)
    with open_image(path) as image:
        if image is not None:
            return Header(is_image=True, height=image.height, width=image.width)
    with _open_video(path) as (_, stream):
        return Header(is_image=False, height=stream.height, width=stream.width)


def read(
    path: Path,
    *,
    frames: FrameRange | None = None,
    height: int | None = None,
    width: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Clip:
    """Read frames, scaled to cover `height` x `width` and cropped to it around the centre.

    Args:
        path: a video or an image.
        frames: which frames, all by default.
        height: in pixels; from `width` and the aspect ratio, or as in the file, when not given.
        width: in pixels; from `height` and the aspect ratio, or as in the file, when not given.
        advance: called after each frame.

    Raises:
        InputError: the file can't be read whole, has not the frames asked for, or is too large.
    """
    check_input(path)
    wanted = frames or FrameRange()
    with opened(path) as (source, fps, notes):
        return _collect(path, source, fps, notes, wanted, (height, width), advance)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Iterator[Image.Image], Fraction, tuple[str, ...]]]:
    """Pictures in order of display, how many there are per second, and notes."""
    with open_image(path) as image:
        if image is not None:
            yield iter([upright_rgb(path, image)]), Fraction(1), image_notes(image)
            return
    with _open_video(path) as (container, stream):
        yield _decoded(path, container, stream), _fps(stream), _video_notes(container, stream)


def _collect(
    path: Path,
    source: Iterator[Image.Image],
    fps: Fraction,
    notes: tuple[str, ...],
    wanted: FrameRange,
    asked: tuple[int | None, int | None],
    advance: Callable[[], None],
) -> Clip:
    kept = bytearray()  # Grows in place, where a list of frames would be copied into an array at the end.
    source_size = target = (0, 0)
    seen = 0
    for picture in source:
        seen += 1
        if seen <= wanted.start:
            continue
        if not kept:
            source_size = (picture.height, picture.width)
            target = _target_size(source_size, asked)
        kept += cover(picture, target).data
        if len(kept) > MAX_CLIP_BYTES:
            raise InputError(
                f"{path}: over {MAX_CLIP_BYTES >> 30} GiB of pixels after {seen - wanted.start} frames of "
                f"{target[1]}x{target[0]}: take fewer with --frames A:B, or a smaller --height"
            )
        advance()
        if wanted.stop is not None and seen >= wanted.stop:
            break
    if not seen:
        raise InputError(f"{path} has no frames")
    if not kept or (wanted.stop is not None and seen < wanted.stop):
        raise InputError(f"--frames {wanted} goes beyond {path}, which has {seen} frame{'s' * (seen > 1)}")
    frames = np.frombuffer(kept, np.uint8).reshape(-1, *target, 3)
    return Clip(frames=frames, fps=fps, source_size=source_size, notes=notes)


def _target_size(source: tuple[int, int], asked: tuple[int | None, int | None]) -> tuple[int, int]:
    """Height and width; the one that is not asked for follows the aspect ratio, to an even number."""
    height, width = asked
    if height is None and width is None:
        return source
    if height is None:
        assert width is not None
        height = max(2, 2 * round(source[0] * width / source[1] / 2))
    if width is None:
        width = max(2, 2 * round(source[1] * height / source[0] / 2))
    if height * width > MAX_FRAME_PIXELS:
        raise InputError(f"--height {height} --width {width}: more than {MAX_FRAME_PIXELS} pixels")
    return height, width


def cover(picture: Image.Image, target: tuple[int, int]) -> Frame:
    """Scale until `target` is covered, crop around the centre: one resampling of the region that stays."""
    height, width = target
    if (picture.height, picture.width) != target:
        scale = max(width / picture.width, height / picture.height)
        kept_width, kept_height = width / scale, height / scale
        left, top = (picture.width - kept_width) / 2, (picture.height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture, dtype=np.uint8)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    # An open file and not its name: names can be playlists or protocols that lead elsewhere.
    with path.open("rb") as file:
        try:
            container = av.open(file, mode="r")
        except (av.FFmpegError, ValueError) as error:
            why = f"{_words(error)}: another kind of file, or cut short"
            raise InputError(f"{path} can't be read as an image or a video ({why})") from error
        with container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise InputError(f"{path} has no video in it")
            context: Any = streams[0].codec_context
            if context is None:
                raise InputError(f"{path}: no decoder for its kind of video, or a broken header")
            check_pixels(path, context.width, context.height)
            streams[0].thread_type = "AUTO"
            yield container, streams[0]


def _decoded(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Image.Image]:
    """Frames in order of display: upright, RGB, with square pixels."""
    seen = 0
    problems: list[str] = []
    for frame in _frames(container, stream, problems):
        width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
        check_pixels(path, width, frame.height)
        if frame.is_corrupt:
            problems.append("the frame is damaged")
            break
        yield _picture(frame, width)
        seen += 1
    size = path.stat().st_size
    if any(entry.pos + entry.size > size for entry in stream.index_entries):
        problems.append("the file ends early")
    if problems:
        remedy = f"; the first {seen} can be read: use --frames 0:{seen}" if seen else ""
        raise InputError(f"{path} is broken at frame {seen} ({problems[0]}){remedy}")


def _frames(container: InputContainer, stream: VideoStream, problems: list[str]) -> Iterator[VideoFrame]:
    """What can be decoded. What went wrong, if anything, is then in `problems`."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                problems.append("the file ends early")
                break
            yield from packet.decode()
        else:
            return
    except (av.FFmpegError, ValueError) as error:
        problems.append(_words(error))
    # The decoder works on several frames at once: those before the damage are still in it.
    with suppress(av.FFmpegError):
        yield from stream.decode(None)


def _picture(frame: VideoFrame, width: int) -> Image.Image:
    """Upright, RGB, `width` pixels wide before it is turned."""
    colorspace: Any = frame.colorspace
    if colorspace == _UNSPECIFIED_COLORSPACE:
        # What players assume: BT.709 from 720 lines on, else BT.601.
        colorspace = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    rgb = frame.reformat(
        width=width,
        format="rgb24",
        src_colorspace=colorspace,
        interpolation=_SCALER,
    )
    array = rgb.to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(array, turns)) if turns else array)


def _fps(stream: VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate).limit_denominator(100_000) if rate else Fraction(25)


def _video_notes(container: InputContainer, stream: VideoStream) -> tuple[str, ...]:
    notes: list[str] = []
    if container.streams.audio:
        notes.append("the sound is left out")
    if not (stream.average_rate or stream.guessed_rate):
        notes.append("the file has no frame rate: 25 per second assumed")
    elif stream.average_rate and stream.base_rate and abs(stream.average_rate / stream.base_rate - 1) > _EVEN:
        notes.append("the frames come at uneven times: all are taken, at their average rate")
    context: Any = stream.codec_context
    if context.format is not None and any(component.is_alpha for component in context.format.components):
        notes.append("the alpha channel is left out")
    if context.color_trc in _HDR:
        notes.append("its colours are HDR: they are taken as they are, without tone mapping")
    return tuple(notes)


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or first_line(error)).lower()
