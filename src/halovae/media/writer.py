"""Write frames as an mp4 video or a PNG image, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.packet import Packet
from av.video.format import VideoFormat
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from halovae.base.errors import InputError
from halovae.base.files import atomic, first_line, reason
from halovae.media.opened_file import TICKS

Frames = Iterable[NDArray[np.uint8]]
"""(height, width, 3), RGB, of 0 to 255."""

SUFFIXES = (".mp4", ".png")
CRF = 16
"""Of x264: visually lossless for most content, so that what is seen is the VAE's doing."""
_ENCODER = {"preset": "medium", "x264-params": "mbtree=0:chromaloc=0"}
"""Of x264. Its macroblock tree makes different files of the same frames, one time in five on small noisy ones.
`chromaloc` says that colour is sampled where every player assumes it, at the left of two pixels."""
_AT_ONCE = {"preset": "veryfast", "tune": "zerolatency"}
"""Of x264, where somebody waits for every frame."""
_FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
LOSSLESS = "lossless"
"""The comment in a file that holds every pixel as it was given; nothing else in it tells for certain."""
_SCALE = "flags=lanczos+accurate_rnd:out_color_matrix=bt709:out_range=tv:out_chroma_loc=left"
"""For libavfilter; libswscale by itself would sample colour between two pixels."""
_AHEAD = 8
"""Frames that wait for a `Writer`."""
_BT709, _RGB = 1, 0
"""ITU-T H.273 gives matrix, primaries and transfer of BT.709 the same number; the matrix of RGB is none."""


def write(
    path: Path,
    frames: Frames,
    fps: Fraction,
    advance: Callable[[], None] = lambda: None,
    crf: int | None = None,
    times: Sequence[int] = (),
    lossless: bool = False,
    live: bool = False,
) -> tuple[str, ...]:
    """Write `frames` to `path`; its suffix chooses the format. A file of that name is replaced at the very end.

    Args:
        path: ends with one of `SUFFIXES`.
        frames: (height, width, 3), RGB; taken one by one. PNG takes one frame only.
        fps: frames per second.
        advance: called after each frame.
        crf: of x264, 0 to 51; 0 loses nothing but colour resolution and what conversion rounds. None: `CRF`.
        times: when each frame begins and, last, when the final one ends, in 1/90000 s from the first one on; empty:
            evenly, `fps` a second.
        lossless: keep every pixel of an mp4 as it is, in RGB; `crf` is not used then. PNG always does.
        live: for who watches meanwhile: the file has its name from the first frame on, and each frame is a fragment
            that can be shown as soon as the next one is there.

    Returns:
        Notes on what a reader might not expect of the file.

    Raises:
        InputError: the file can't be written, or several frames for one PNG.
    """
    left = iter(frames)
    first = next(left)
    if path.suffix.lower() == ".png":
        with atomic(path) as draft:
            Image.fromarray(first).save(draft, format="PNG")
            advance()
            check_still(path, 1 + sum(1 for _ in left))
        return ()
    height, width = first.shape[:2]
    crf = 0 if lossless else CRF if crf is None else crf
    # 4:2:0 halves both sizes; H.264 can't say "one column less" in it.
    even = height % 2 == 0 and width % 2 == 0
    try:
        place, how = (nullcontext(path), _FRAGMENTS) if live else (atomic(path), {})
        with place as draft, av.open(str(draft), mode="w", format="mp4", options=how) as container:
            # Without frames that are sent before earlier ones, the muxer keeps every duration, the last one too.
            order = _AT_ONCE if live else {"bf": "0"} if times else {}
            codec, pixel_format = "libx264", "yuv420p" if even else "yuv444p"
            if lossless:
                codec, pixel_format = "libx264rgb", "rgb24"
                container.metadata["comment"] = LOSSLESS
            stream = container.add_stream(codec, rate=fps, options={"crf": str(crf), **_ENCODER, **order})
            _describe(stream, height, width, pixel_format)
            if times:
                stream.codec_context.time_base = Fraction(1, TICKS)
            lasts = {begin: end - begin for begin, end in zip(times[:-1], times[1:], strict=True)}
            to_yuv = _converter(stream)
            for number, pixels in enumerate(chain([first], left)):
                frame = to_yuv(pixels)
                frame.time_base = Fraction(1, TICKS) if times else 1 / fps
                frame.pts = times[number] if times else number
                container.mux(_lasting(stream.encode(frame), lasts))
                advance()
            container.mux(_lasting(stream.encode(), lasts))
    except av.FFmpegError as error:
        why = reason(error) if isinstance(error, OSError) else first_line(error)
        raise InputError(f"can't write {path}: {why}") from error
    if lossless:
        return ("lossless: written as RGB in H.264, which not every player shows",)
    return () if even else (f"{width}x{height} is odd: written as yuv444p, which not every player shows",)


class Writer:
    """Writes frames in a thread, while the next ones are made. Within it, `put` them; its end waits until the file is
    whole. Where the block fails, nothing is written, and an old file of that name stays.

    Args:
        path, fps, settings: as for `write`.
        through: what frames go through in the thread, on their way to the file.

    Attributes:
        notes: what `write` returns, at the end.
    """

    def __init__(
        self, path: Path, fps: Fraction, through: Callable[[Frames], Frames] = lambda frames: frames, **settings: Any
    ) -> None:  # fmt: skip
        self.notes: tuple[str, ...] = ()
        self._frames: SimpleQueue[NDArray[np.uint8] | None] = SimpleQueue()
        self._room = Semaphore(_AHEAD)
        self._failure: BaseException | None = None
        self._given_up = False

        def run() -> None:
            try:
                self.notes = write(path, through(self._taken()), fps, **settings)
            except BaseException as error:
                self._failure = error
            self._room.release(_AHEAD + 1)  # For who waits: nothing is taken any more.

        self._thread = Thread(target=run, name="halovae writer", daemon=True)
        self._thread.start()

    def put(self, frame: NDArray[np.uint8]) -> None:
        """Have a frame written; waits while several others are not.

        Raises:
            InputError: the file can't be written.
        """
        self._room.acquire()
        if self._failure is not None:
            raise self._failure
        self._frames.put(frame)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._given_up = kind is not None
        self._frames.put(None)
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _taken(self) -> Iterator[NDArray[np.uint8]]:
        while (frame := self._frames.get()) is not None and not self._given_up:
            yield frame
            del frame
            self._room.release()
        if self._given_up:
            raise _GivenUpError


class _GivenUpError(Exception):
    """Nobody wants the file any more."""


def check_still(path: Path, frames: int) -> None:
    """Refuse to write several frames to one image."""
    if path.suffix.lower() == ".png" and frames != 1:
        raise InputError(f"output {path} is one image, but there are {frames} frames: name it .mp4")


def _lasting(packets: list[Packet], lasts: Mapping[int, int]) -> list[Packet]:
    """Packets that say how long their frames last, where that is known."""
    for packet in packets:
        if packet.pts is not None and packet.pts in lasts:
            packet.duration = lasts[packet.pts]
    return packets


def _describe(stream: VideoStream, height: int, width: int, pixel_format: str) -> None:
    stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
    context = stream.codec_context
    context.color_primaries = context.color_trc = _BT709
    is_rgb = pixel_format == "rgb24"
    context.colorspace = _RGB if is_rgb else _BT709
    context.color_range = ColorRange.JPEG if is_rgb else ColorRange.MPEG


def _converter(stream: VideoStream) -> Callable[[NDArray[np.uint8]], av.VideoFrame]:
    """From RGB to what the stream takes."""
    if stream.pix_fmt == "rgb24":
        return lambda pixels: av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    graph = Graph()
    pixel_format = VideoFormat("rgb24", stream.width, stream.height)
    source = graph.add_buffer(
        width=stream.width, height=stream.height, format=pixel_format, time_base=Fraction(1, TICKS)
    )
    steps = [graph.add("scale", _SCALE), graph.add("format", f"pix_fmts={stream.pix_fmt}"), graph.add("buffersink")]
    graph.link_nodes(source, *steps).configure()

    def to_yuv(pixels: NDArray[np.uint8]) -> av.VideoFrame:
        graph.push(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
        frame: Any = graph.pull()
        return frame

    return to_yuv
