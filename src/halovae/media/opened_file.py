"""What is in an opened file: its pictures, and when they are shown, at one rate or each at a time of its own.

Also how large they may be, and what to say of a broken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from PIL import Image

from halovae.base.errors import InputError

MAX_FRAME_PIXELS = 2**26
"""A header that claims more than 8192 x 8192 is taken for broken or hostile."""
MAX_CLIP_BYTES = 8 * 2**30
"""Frames are held in memory as 8-bit RGB; a forgotten `--frames` on a film would take all of it."""
TICKS = 90_000
"""Times of frames are whole numbers of such parts of a second."""
_ASSUMED = Fraction(25)
"""Frames per second of a clip that tells nothing of it."""
_FASTEST = 1000
"""A file that claims more frames per second than this is not believed."""
_LONGEST = 3600
"""Seconds: a longer wait between two frames is a time stamp gone wrong."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture of a clip, and when it is shown."""

    size: tuple[int, int]
    """Height and width."""
    make: Callable[[], Image.Image]
    """Gives the picture: not every one is looked at."""
    begins: Fraction | None
    """In seconds, from any moment on; None where the file doesn't say."""
    lasts: Fraction | None = None
    """Seconds, where the file says it."""

    @cached_property
    def picture(self) -> Image.Image:
        return self.make()

    @property
    def end(self) -> Fraction | None:
        """When the next one begins, as far as this one tells."""
        return None if self.begins is None or self.lasts is None else self.begins + self.lasts


@dataclass(kw_only=True)
class OpenedFile:
    """An opened file."""

    size: tuple[int, int]
    """Height and width in the header, which says nothing of how a picture is turned."""
    pictures: Iterator[Shown]
    """In order of display: upright, RGB, with square pixels."""
    is_still: bool = False
    rates: tuple[Fraction, ...] = ()
    """Frames per second that the file claims, the most believable first."""
    tick: Fraction = Fraction(0)
    """Seconds that its times are rounded to."""
    lossy: str = ""
    """What its pictures were compressed with, where that may have lost something."""
    notes: list[str] = field(default_factory=list[str])
    """What of the file is not taken over, one line each. Pictures that are taken may add to it."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When frames are shown."""

    fps: Fraction
    """Frames per second, on average where they come unevenly."""
    times: tuple[int, ...] = ()
    """When each frame begins and, last, when the final one ends, in `TICKS` of a second from the first one on; empty
    where frames come evenly."""
    notes: tuple[str, ...] = ()


def pace_of(source: OpenedFile, begins: Sequence[Fraction | None], end: Fraction | None) -> Pace:
    """The pace of frames that were taken from a source: when each of them begins, in seconds, and the last one ends."""
    if source.is_still:
        return Pace(fps=Fraction(1))
    rates = [rate.limit_denominator(100_000) for rate in source.rates if 0 < rate <= _FASTEST]
    times = _in_order(begins)
    if times is None:
        if rates:
            return Pace(fps=rates[0])
        return Pace(fps=_ASSUMED, notes=(f"the file has no frame rate: {_ASSUMED} per second assumed",))
    if len(times) == 1:
        lasts = None if end is None or end - times[0] <= Fraction(1, _FASTEST) else end - times[0]
        return Pace(fps=rates[0] if rates else _ASSUMED if lasts is None else (1 / lasts).limit_denominator(100_000))
    own = (Fraction(len(times) - 1) / (times[-1] - times[0])).limit_denominator(100_000)
    for rate in (*rates, own):
        if _is_even(times, rate, source.tick):
            return Pace(fps=rate)
    return _uneven(times, end)


def _in_order(begins: Sequence[Fraction | None]) -> list[Fraction] | None:
    """The times, if they are all there and could be true."""
    times = [time for time in begins if time is not None]
    if len(times) < len(begins) or not all(0 < b - a < _LONGEST for a, b in zip(times[:-1], times[1:], strict=True)):
        return None
    return None if len(times) > (times[-1] - times[0]) * _FASTEST + 1 else times


def _is_even(times: Sequence[Fraction], rate: Fraction, tick: Fraction) -> bool:
    """Whether each frame is shown within a quarter of a frame of its turn, or as near as rounded times can be."""
    slack = max(float(tick), 0.25 / float(rate))
    first, rate_ = times[0], float(rate)
    return all(abs(float(time - first) - number / rate_) <= slack for number, time in enumerate(times))


def _uneven(times: Sequence[Fraction], end: Fraction | None) -> Pace:
    if end is None or not 0 < end - times[-1] < _LONGEST:
        end = times[-1] + (times[-1] - times[-2])
    ticks: list[int] = []
    for time in (*times, end):
        # Two frames of one tick would be one frame to every reader.
        ticks.append(max(round((time - times[0]) * TICKS), ticks[-1] + 1 if ticks else 0))
    fps = Fraction(len(times) * TICKS, ticks[-1]).limit_denominator(100_000)
    return Pace(
        fps=fps,
        times=tuple(ticks),
        notes=(f"the frames come unevenly, {float(fps):.4g} per second on average: each keeps its time",),
    )


def check_pixels(path: Path, width: int, height: int) -> None:
    """Refuse a size before any memory is taken for it: more pixels than `MAX_FRAME_PIXELS`, or none."""
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{path} claims {width}x{height} pixels, more than the limit of {MAX_FRAME_PIXELS}: too large, or broken"
        )
    if width < 1 or height < 1:
        raise InputError(f"{path} has a picture of {width}x{height} pixels")


def broken(path: Path, frame: int, why: str) -> str:
    """What to tell of a clip whose frames before `frame` are whole."""
    remedy = f"; the first {frame} can be read: use --frames 0:{frame}" if frame else ""
    return f"{path} is broken at frame {frame} ({why}){remedy}"
