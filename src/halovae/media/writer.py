"""Write frames as an mp4 video or a PNG image, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from halovae.errors import InputError
from halovae.files import atomic, first_line, reason

Frames = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

SUFFIXES = (".mp4", ".png")
CRF = 16
"""Of x264: visually lossless for most content, so that what is seen is the VAE's doing."""
_ENCODER = {"preset": "medium", "x264-params": "mbtree=0"}
"""Of x264. Its macroblock tree makes different files of the same frames, one time in five on small noisy ones."""
_SCALER = 0x200 | 0x40000
"""SWS_LANCZOS and SWS_ACCURATE_RND of libswscale."""
_BT709 = 1
"""ITU-T H.273 gives matrix, primaries and transfer of BT.709 the same number."""


def write(
    path: Path,
    frames: Frames,
    fps: Fraction,
    advance: Callable[[], None] = lambda: None,
    crf: int | None = None,
) -> tuple[str, ...]:
    """Write `frames` to `path`; its suffix chooses the format. A file of that name is replaced at the very end.

    Args:
        path: ends with one of `SUFFIXES`.
        frames: (frames, height, width, 3), RGB; taken one by one. PNG takes one frame only.
        fps: frames per second.
        advance: called after each frame.
        crf: of x264, 0 to 51; 0 loses nothing but colour resolution. None: `CRF`.

    Returns:
        Notes on what a reader might not expect of the file.

    Raises:
        InputError: the file can't be written, or several frames for one PNG.
    """
    if path.suffix.lower() == ".png":
        check_still(path, len(frames))
        with atomic(path) as draft:
            Image.fromarray(frames[0]).save(draft, format="PNG")
        advance()
        return ()
    return _write_mp4(path, frames, fps, advance, CRF if crf is None else crf)


def check_still(path: Path, frames: int) -> None:
    """Refuse to write several frames to one image.

    Raises:
        InputError: `path` is an image and `frames` is not 1.
    """
    if path.suffix.lower() == ".png" and frames != 1:
        raise InputError(f"output {path} is one image, but there are {frames} frames: name it .mp4")


def _write_mp4(path: Path, frames: Frames, fps: Fraction, advance: Callable[[], None], crf: int) -> tuple[str, ...]:
    height, width = frames[0].shape[:2]
    # 4:2:0 halves both sizes; H.264 can't say "one column less" in it.
    even = height % 2 == 0 and width % 2 == 0
    try:
        with atomic(path) as draft, av.open(str(draft), mode="w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), **_ENCODER})
            _describe(stream, height, width, "yuv420p" if even else "yuv444p")
            for pixels in frames:
                container.mux(stream.encode(_to_yuv(pixels, stream)))
                advance()
            container.mux(stream.encode())
    except av.FFmpegError as error:
        why = reason(error) if isinstance(error, OSError) else first_line(error)
        raise InputError(f"can't write {path}: {why}") from error
    return () if even else (f"{width}x{height} is odd: written as yuv444p, which not every player shows",)


def _describe(stream: VideoStream, height: int, width: int, pixel_format: str) -> None:
    stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def _to_yuv(pixels: NDArray[np.uint8], stream: VideoStream) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(
        format=stream.pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=_SCALER,
    )
