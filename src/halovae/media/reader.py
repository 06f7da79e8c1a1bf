"""Read a video or an image, by content and not by name, as 8-bit RGB frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halovae.base.errors import InputError
from halovae.base.files import check_input
from halovae.media.frame_range import FrameRange
from halovae.media.images import open_pictures
from halovae.media.media_limits import MAX_CLIP_BYTES, MAX_FRAME_PIXELS
from halovae.media.pace import OpenedFile, pace_of
from halovae.media.video import open_video

Frame = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames in memory."""

    frames: Frame
    """(frames, height, width, 3), RGB."""
    fps: Fraction
    """Frames per second, on average where they come unevenly; 1 for an image."""
    times: tuple[int, ...] = ()
    """Where frames come unevenly: when each begins and, last, when the final one ends, in 1/90000 s from the first
    one on. Empty where they come evenly."""
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
    with opened(path) as source:
        return Header(is_image=source.is_still, height=source.size[0], width=source.size[1])


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
    with opened(path) as source:
        return _collect(path, source, frames or FrameRange(), (height, width), advance)


@contextmanager
def opened(path: Path) -> Iterator[OpenedFile]:
    """The pictures of a video or an image."""
    with open_pictures(path) as source:
        if source is not None:
            yield source
            return
    with open_video(path) as source:
        yield source


def _collect(
    path: Path,
    source: OpenedFile,
    wanted: FrameRange,
    asked: tuple[int | None, int | None],
    advance: Callable[[], None],
) -> Clip:
    kept = bytearray()  # Grows in place, where a list of frames would be copied into an array at the end.
    begins: list[Fraction | None] = []
    end: Fraction | None = None
    source_size = target = (0, 0)
    seen = 0
    for shown in source.pictures:
        seen += 1
        if seen <= wanted.start:
            continue
        if not kept:
            source_size = (shown.picture.height, shown.picture.width)
            target = _target_size(source_size, asked)
        kept += cover(shown.picture, target).data
        if len(kept) > MAX_CLIP_BYTES:
            raise InputError(
                f"{path}: over {MAX_CLIP_BYTES >> 30} GiB of pixels after {seen - wanted.start} frames of "
                f"{target[1]}x{target[0]}: take fewer with --frames A:B, or a smaller --height"
            )
        begins.append(shown.begins)
        end = shown.end
        advance()
        if wanted.stop is not None and seen >= wanted.stop:
            end = _next_begin(source) or end
            break
    if not seen:
        raise InputError(f"{path} has no frames")
    if not kept or (wanted.stop is not None and seen < wanted.stop):
        raise InputError(f"--frames {wanted} goes beyond {path}, which has {seen} frame{'s' * (seen > 1)}")
    pace = pace_of(source, begins, end)
    return Clip(
        frames=np.frombuffer(kept, np.uint8).reshape(-1, *target, 3),
        fps=pace.fps,
        times=pace.times,
        source_size=source_size,
        notes=(*source.notes, *pace.notes),
    )


def _next_begin(source: OpenedFile) -> Fraction | None:
    """When the frame begins that is not wanted any more; it may be a damaged one."""
    try:
        shown = next(source.pictures, None)
    except InputError:
        return None
    return None if shown is None else shown.begins


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
        box = covered((picture.height, picture.width), target)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture, dtype=np.uint8)


def covered(source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what `cover` takes of a picture, in its pixels.

    Args:
        source: height and width of the picture.
        target: height and width that it is scaled to.
    """
    (rows, columns), (height, width) = source, target
    scale = max(width / columns, height / rows)
    kept_width, kept_height = width / scale, height / scale
    left, top = (columns - kept_width) / 2, (rows - kept_height) / 2
    return left, top, left + kept_width, top + kept_height
