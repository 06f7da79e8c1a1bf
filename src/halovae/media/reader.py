"""Read a video or an image, by content and not by name, as 8-bit RGB frames."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halovae.base.errors import InputError, counted
from halovae.base.files import check_input
from halovae.media.images import open_pictures
from halovae.media.opened_file import MAX_CLIP_BYTES, MAX_FRAME_PIXELS, OpenedFile, Pace, Shown, pace_of
from halovae.media.video import open_video

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class FrameRange:
    """Frames `start` to `stop` - 1, counted from 0. `stop` None means to the end."""

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise InputError(f"--frames {self}: give A:B with A below B, as in 0:33")

    @classmethod
    def parse(cls, text: str) -> FrameRange:
        """From "A:B", "A:" or ":B"."""
        match = re.fullmatch(r"(\d{0,12}):(\d{0,12})", text)
        if match is None:
            raise InputError(f"--frames {text}: give A:B, A: or :B, as in 0:33")
        start, stop = match.groups()
        return cls(int(start or 0), int(stop) if stop else None)

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"


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
    """Look at the header only."""
    check_input(path)
    with opened(path) as source:
        return Header(is_image=source.is_still, height=source.size[0], width=source.size[1])


def read(
    path: Path, *, frames: FrameRange | None = None, height: int | None = None, width: int | None = None
) -> Clip:  # fmt: skip
    """Read frames, scaled to cover `height` x `width` and cropped to it around the centre.

    Args:
        path: a video or an image.
        frames: which frames, all by default.
        height: in pixels; from `width` and the aspect ratio, or as in the file, when not given.
        width: in pixels; from `height` and the aspect ratio, or as in the file, when not given.

    Raises:
        InputError: the file can't be read whole, has not the frames asked for, or is too large.
    """
    film = Film(path, frames=frames, height=height, width=width)
    rows, columns = film.size
    if film.count * rows * columns * 3 > MAX_CLIP_BYTES:
        raise InputError(
            f"{path}: over {MAX_CLIP_BYTES >> 30} GiB of pixels in {film.count} frames of {columns}x{rows}: take fewer "
            "with --frames A:B, or a smaller --height"
        )
    kept = np.empty((film.count, rows, columns, 3), np.uint8)
    for count, frame in enumerate(film):
        kept[count] = frame
    return Clip(
        frames=kept, fps=film.pace.fps, times=film.pace.times, source_size=film.source_size, notes=film.notes
    )  # fmt: skip


class Film:
    """A clip that may be longer than memory: its frames are decoded anew each time they are gone through.

    Args:
        path, frames, height, width: as for `read`.
        advance: called after each frame while they are counted, at first.

    Raises:
        InputError: as by `read`; of no size is it too large.
    """

    def __init__(
        self,
        path: Path,
        *,
        frames: FrameRange | None = None,
        height: int | None = None,
        width: int | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        check_input(path)
        self.path = path
        self._choice = frames, (height, width)
        with opened(path) as source:
            wanted = _Wanted(path, source, *self._choice)
            for shown in wanted:
                if wanted.count == 1:
                    shown.make()  # Whether its pixels can be converted; of the others the number is wanted only.
                advance()
            self.pace = wanted.pace()
        self.count, self.size, self.source_size = wanted.count, wanted.size, wanted.source_size
        """`size`: height and width of every frame; `source_size`: those in the file."""
        self._whole = self.size
        self.lossy = source.lossy
        """What it was compressed with, where that may have lost something."""
        self.notes = (*source.notes, *self.pace.notes)
        """As of a `Clip`."""

    def trim(self, count: int, height: int, width: int) -> None:
        """Keep the first frames only, and of them the middle."""
        self.count, self.size = count, (height, width)

    def __iter__(self) -> Iterator[Frame]:
        height, width = self.size
        top, left = (self._whole[0] - height) // 2, (self._whole[1] - width) // 2
        with opened(self.path) as source:
            wanted = _Wanted(self.path, source, *self._choice)
            for shown in islice(wanted, self.count):
                yield cover(shown.picture, self._whole)[top : top + height, left : left + width]
        if wanted.count < self.count:
            raise InputError(
                f"{self.path} has changed while it was read: it has {wanted.count} frames now, not {self.count}"
            )


@contextmanager
def opened(path: Path, threads: int = 0) -> Iterator[OpenedFile]:
    """The pictures of a video or an image; `threads` as of `open_video`."""
    with open_pictures(path) as source:
        if source is not None:
            yield source
            return
    with open_video(path, threads) as source:
        yield source


class _Wanted:
    """The pictures of an opened file that are wanted, and what is known of them once they were gone through."""

    def __init__(
        self, path: Path, source: OpenedFile, frames: FrameRange | None, asked: tuple[int | None, int | None]
    ) -> None:  # fmt: skip
        self._path, self._source, self._frames, self._asked = path, source, frames or FrameRange(), asked
        self.count, self.source_size, self.size = 0, (0, 0), (0, 0)
        self._begins: list[Fraction | None] = []
        self._end: Fraction | None = None

    def __iter__(self) -> Iterator[Shown]:
        path, source, wanted, seen = self._path, self._source, self._frames, 0
        for shown in source.pictures:
            seen += 1
            if seen <= wanted.start:
                continue
            if not self.count:
                self.source_size = shown.size
                self.size = _target_size(self.source_size, self._asked)
            self.count += 1
            self._begins.append(shown.begins)
            self._end = shown.end
            yield shown
            if wanted.stop is not None and seen >= wanted.stop:
                self._end = _next_begin(source) or self._end
                break
        if not seen:
            raise InputError(f"{path} has no frames")
        if not self.count or (wanted.stop is not None and seen < wanted.stop):
            raise InputError(f"--frames {wanted} goes beyond {path}, which has {counted(seen, 'frame')}")

    def pace(self) -> Pace:
        return pace_of(self._source, self._begins, self._end)


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
    check_size(height, width)
    return height, width


def check_size(height: int, width: int) -> None:
    """Refuse a picture of more than `MAX_FRAME_PIXELS`: the prediction alone of one would take minutes to hours."""
    if height * width > MAX_FRAME_PIXELS:
        raise InputError(f"--height {height} --width {width}: more than {MAX_FRAME_PIXELS} pixels")


def cover(picture: Image.Image, target: tuple[int, int]) -> Frame:
    """Scale until `target` is covered, crop around the centre: one resampling of the region that stays."""
    height, width = target
    if (picture.height, picture.width) != target:
        box = covered((picture.height, picture.width), target)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture, dtype=np.uint8)


def covered(source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what `cover` takes of a picture, in its pixels; sizes are height and width."""
    (rows, columns), (height, width) = source, target
    scale = max(width / columns, height / rows)
    kept_width, kept_height = width / scale, height / scale
    left, top = (columns - kept_width) / 2, (rows - kept_height) / 2
    return left, top, left + kept_width, top + kept_height
