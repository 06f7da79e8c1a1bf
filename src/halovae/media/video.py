"""Videos, through libav: their pictures upright, in RGB, with square pixels, and when each is shown."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.media.opened_file import OpenedFile, Shown, broken, check_pixels
from halovae.media.writer import LOSSLESS

_HDR = (16, 18)
"""The transfer functions PQ and HLG in ITU-T H.273."""
_MATRICES = frozenset((0, 1, 4, 5, 6, 7, 9))
"""What libswscale converts to RGB, of the matrices in ITU-T H.273."""
_OTHER_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "YDzDx",
    12: "derived from the primaries",
    13: "derived from the primaries, with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
_SCALER = 0x200 | 0x2000 | 0x40000
"""SWS_LANCZOS, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND of libswscale: without the last two, chroma is repeated and not
interpolated, and pictures come out one level too dark (4 dB on the shipped clip)."""
_TO_THE_END = ("yuv4mpegpipe",)
"""Kinds of files in which nothing follows the last frame."""
_ORIENTATIONS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}
"""EXIF's numbers by the signs of a display matrix: x' = ax + cy and y' = bx + dy for (a, b, c, d)."""
_ON_ITS_SIDE = 5
"""From this number on, height and width change places."""
_ORIENTATION = 0x0112
"""EXIF's tag."""
_local = threading.local()


@contextmanager
def open_video(path: Path, threads: int = 0) -> Iterator[OpenedFile]:
    """The video in a file, decoded by so many threads; 0: one for each core. There has to be one."""
    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = threads
        notes = _notes(container, stream)
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        yield OpenedFile(
            size=(stream.height, stream.width),
            pictures=_shown(path, container, stream, notes),
            rates=tuple(Fraction(rate) for rate in rates if rate),
            tick=Fraction(stream.time_base or 0),
            lossy=_lossy(container, stream),
            notes=notes,
        )


def frame_times(path: Path) -> list[Fraction | None]:
    """When each frame of the video in a file begins, in seconds and in order of display, without decoding any.

    A time is None where the file doesn't say it.
    """
    with _opened(path) as (container, stream):
        tick = Fraction(stream.time_base or 0)
        try:
            packets = [one for one in container.demux(stream) if one.size and not one.is_discard]
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"{path} can't be read as a video ({_words(error)})") from error
        if any(packet.pts is None for packet in packets):
            return [None] * len(packets)
        return [time * tick for time in sorted(packet.pts or 0 for packet in packets)]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    # An open file and not its name: names can be playlists or protocols that lead elsewhere.
    with path.open("rb") as file:
        try:
            container = av.open(file, mode="r")
        except (av.FFmpegError, ValueError) as error:
            why = f"{_words(error)}: another kind of file, or cut short"
            raise InputError(f"{path} can't be read as an image or a video ({why})") from error
        with container:
            streams = _tracks(container)
            if not streams:
                raise InputError(f"{path} has no video in it")
            stream = max(streams, key=lambda one: bool(one.disposition & Disposition.default))
            context: Any = stream.codec_context
            if context is None:
                raise InputError(f"{path}: no decoder for its kind of video, or a broken header")
            check_pixels(path, context.width, context.height)
            stream.thread_type = "AUTO"
            yield container, stream


def _tracks(container: InputContainer) -> list[VideoStream]:
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _notes(container: InputContainer, stream: VideoStream) -> list[str]:
    notes: list[str] = []
    others = len(_tracks(container)) - 1
    if others:
        notes.append(f"{others} other video track{'s are' if others > 1 else ' is'} left out")
    if container.streams.audio:
        notes.append("the sound is left out")
    context: Any = stream.codec_context
    if context.format is not None and any(component.is_alpha for component in context.format.components):
        notes.append("the alpha channel is left out")
    if context.color_trc in _HDR:
        notes.append("its colours are HDR: they are taken as they are, without tone mapping")
    return notes


def _lossy(container: InputContainer, stream: VideoStream) -> str:
    """The codec, unless it never loses anything or the file is one of ours in which it didn't."""
    codec = stream.codec
    return "" if not codec.lossy or container.metadata.get("comment") == LOSSLESS else codec.name


def _shown(path: Path, container: InputContainer, stream: VideoStream, notes: list[str]) -> Iterator[Shown]:
    """Frames in order of display."""
    seen, turned, orientation = 0, None, 1
    problems: list[str] = []
    for packet, frame in _frames(path, container, stream, problems):
        width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
        check_pixels(path, width, frame.height)
        if frame.is_corrupt:
            problems.append("the frame is damaged")
            break
        if frame.rotation != turned:  # A frame of which more is asked stays in memory until garbage is collected.
            turned = frame.rotation
            orientation, is_skew = _orientation(frame, packet)
            if is_skew:
                notes.append("it is to be shown at an angle: it is turned by the nearest quarter only")
        _matrix(path, frame)  # Checks it.
        tick = Fraction(frame.time_base or stream.time_base or 0)
        yield Shown(
            size=(width, frame.height) if orientation >= _ON_ITS_SIDE else (frame.height, width),
            make=functools.partial(_upright, path, frame, width, orientation),
            begins=None if frame.pts is None else frame.pts * tick,
            lasts=frame.duration * tick if frame.duration else None,
        )
        seen += 1
    if not problems and _is_cut(path, container, stream):
        problems.append("the file ends early")
    if problems:
        raise InputError(broken(path, seen, problems[0]))


def _frames(
    path: Path, container: InputContainer, stream: VideoStream, problems: list[str]
) -> Iterator[tuple[Packet | None, VideoFrame]]:
    """What can be decoded, and what it may have been decoded from. What went wrong is then in `problems`."""
    packet, end = None, 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                problems.append("the file ends early")
                break
            end = max(end, (packet.pos or 0) + packet.size)
            for frame in packet.decode():
                yield packet, frame
        else:
            if container.format.name in _TO_THE_END and end < path.stat().st_size:
                problems.append("the file ends early")
            return
    except (av.FFmpegError, ValueError) as error:
        problems.append(_words(error))
    # The decoder works on several frames at once: those before the damage are still in it.
    with suppress(av.FFmpegError):
        for frame in stream.decode(None):
            yield packet, frame


def _is_cut(path: Path, container: InputContainer, stream: VideoStream) -> bool:
    size = path.stat().st_size
    if "matroska" in container.format.name:  # libav takes what is there, without a word.
        return _ends_in_an_element(path)
    return any(entry.pos + entry.size > size for entry in stream.index_entries)


def _ends_in_an_element(path: Path) -> bool:
    """Whether a Matroska file ends before one of its elements does.

    Elements of unknown size, which live recorders write, are looked into.
    """
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(12)
            name = 9 - head[0].bit_length()
            length = 9 - head[name].bit_length() if name < len(head) else 0
            if not head[0] or name + length > len(head):
                return bool(head[0])
            value = int.from_bytes(head[name : name + length], "big") & ((1 << 7 * length) - 1)
            place += name + length
            if value != (1 << 7 * length) - 1:
                place += value
    return place > size


def _orientation(frame: VideoFrame, packet: Packet | None) -> tuple[int, bool]:
    """EXIF's number of a frame's orientation, and whether the frame is to be shown at an angle besides."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists nothing where there is a kind among it that it doesn't know, such as EXIF.
        return _exif_orientation(packet) or {90: 8, 180: 3, 270: 6}.get(round(frame.rotation) % 360, 1), False
    if data is None:
        return 1, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    along, across = abs(a) + abs(d), abs(b) + abs(c)
    signs = (_sign(a), 0, 0, _sign(d)) if along >= across else (0, _sign(b), _sign(c), 0)
    return _ORIENTATIONS.get(signs, 1), min(along, across) > 0.01 * max(along, across)


def _exif_orientation(packet: Packet | None) -> int | None:
    try:
        with Image.open(io.BytesIO(bytes(packet or b""))) as image:
            return image.getexif().get(_ORIENTATION)
    except Exception:  # As for any image: it is not one, or a broken one.
        return None


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _upright(path: Path, frame: VideoFrame, width: int, orientation: int) -> Image.Image:
    picture = to_rgb(path, frame, width)
    picture.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(picture)


def _matrix(path: Path, frame: VideoFrame) -> Any:
    """By which its colours become RGB."""
    matrix: Any = frame.colorspace
    if matrix in _OTHER_MATRICES:
        raise InputError(
            f"{path}: its colours are {_OTHER_MATRICES[matrix]}, which can't be converted here: convert it to BT.709"
        )
    if matrix in _MATRICES:
        return matrix
    # What players assume: BT.709 from 720 lines on, else BT.601.
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


def to_rgb(path: Path, frame: VideoFrame, width: int) -> Image.Image:
    """`width` pixels wide."""
    matrix = _matrix(path, frame)
    try:
        converted = _converter().reformat(
            frame, threads=1, width=width, format="rgb24", src_colorspace=matrix, interpolation=_SCALER
        )
        return Image.fromarray(converted.to_ndarray())
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"{path}: its pixels ({frame.format.name}) can't be converted to RGB: {_words(error)}"
        ) from error


def _converter() -> VideoReformatter:
    """One for all frames of a thread: by itself PyAV makes one for each frame, which takes as long as its work."""
    if not hasattr(_local, "converter"):
        _local.converter = VideoReformatter()
    return _local.converter


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or first_line(error)).lower()


# ---- a video that is still being written -----------------------------------------------------------------------------


_HEAD = 8
"""Bytes of length and kind at the beginning of each box of an mp4."""


def codec_words(beginning: bytes) -> str:
    """The codec as browsers name it, such as avc1.64001f; nothing where there is too little of the file so far."""
    profile = _settings(beginning)[1:4]
    return f"avc1.{profile.hex()}" if len(profile) == 3 else ""


def _settings(words: bytes) -> bytes:
    """The decoder's settings."""
    at = words.find(b"avcC")
    return words[at + 4 : at - 4 + int.from_bytes(words[at - 4 : at], "big")] if at >= 4 else b""


class LivePictures:
    """The pictures of such a file, which comes in parts of any length."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._decoder: Any = None

    def feed(self, words: bytes) -> Iterator[Image.Image]:
        """The pictures that are whole with the next part of the file."""
        self._bytes += words
        while len(self._bytes) >= _HEAD:
            size, kind = int.from_bytes(self._bytes[:4], "big"), bytes(self._bytes[4:_HEAD])
            if len(self._bytes) < size:
                return
            content = bytes(self._bytes[_HEAD:size])
            del self._bytes[:size]
            if kind == b"moov":
                self._decoder = av.CodecContext.create("h264", "r")
                self._decoder.extradata = _settings(content)
            elif kind == b"mdat":  # One frame.
                for frame in self._decoder.decode(av.Packet(content)):
                    yield to_rgb(Path("stream.mp4"), frame, frame.width)
