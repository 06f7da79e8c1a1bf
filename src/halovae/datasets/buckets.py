"""Buckets: the few sizes that clips are brought to. Which one a clip goes to, and which of its frames it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isqrt, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halovae.base.errors import InputError, counted
from halovae.datasets.items import Item
from halovae.media import FrameRange
from halovae.media.images import open_pictures
from halovae.media.opened_file import MAX_CLIP_BYTES, OpenedFile, Shown, pace_of
from halovae.media.reader import cover, covered, opened
from halovae.media.video import frame_times

_LONGEST = 3
"""Side of a bucket made by area, times the other."""
_ASSUMED = Fraction(25)
"""Frames per second of a video that tells no times."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One size."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    @property
    def pixels(self) -> int:
        return self.height * self.width * self.frames


def parse_buckets(texts: Sequence[str]) -> list[Bucket]:
    """From the words of `--bucket`, in order of size.

    Raises:
        InputError: another form, or a clip larger than fits into memory.
    """
    return sorted({parse_bucket("--bucket", text) for text in texts})


def parse_bucket(flag: str, text: str) -> Bucket:
    """From one of the words of `--bucket` or `--bucket-area`."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?:x(\d{1,5}))?", text)
    sizes = [int(group or 1) for group in match.groups()] if match else [0]
    if min(sizes) < 1:
        raise InputError(f"{flag} {text}: give HEIGHTxWIDTHxFRAMES such as 480x832x81, or 512x512 for images")
    bucket = Bucket(*sizes)
    if 3 * bucket.pixels > MAX_CLIP_BYTES:
        raise InputError(f"{flag} {text}: over {MAX_CLIP_BYTES >> 30} GiB of pixels: give a smaller one")
    return bucket


def parse_areas(texts: Sequence[str], step: int) -> list[Bucket]:
    """From the words of `--bucket-area`: every shape of at most that area whose sides are multiples of `step`, each as
    large as it can be.

    Raises:
        InputError: as by `parse_buckets`, or there is no such shape.
    """
    found: set[Bucket] = set()
    for text in texts:
        asked = parse_bucket("--bucket-area", text)
        area = asked.height * asked.width // step**2
        highest: dict[int, int] = {}  # For each width, in steps.
        for high in range(1, isqrt(_LONGEST * area) + 1):
            highest[area // high] = high
        shapes = [(high, wide) for wide, high in highest.items() if high <= _LONGEST * wide and wide <= _LONGEST * high]
        if not shapes:
            raise InputError(f"--bucket-area {text}: smaller than a square of --bucket-step {step}: give a larger one")
        found |= {Bucket(high * step, wide * step, asked.frames) for high, wide in shapes}
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """What the header of a clip says."""

    height: int
    """Upright, with square pixels."""
    width: int
    frames: int
    """At the rate that is sampled at."""


def look(item: Item, fps: Fraction | None) -> ClipSize:
    """Look at a clip without decoding more than its first frame.

    Args:
        item: the clip.
        fps: the rate to sample at; None: each frame.

    Raises:
        InputError: it can't be read, or has not the frames asked for.
    """
    wanted = item.range
    with item.file() as path, open_pictures(path) as animation:
        if animation is not None:
            pictures = list(animation.pictures)
            size, end = pictures[0].size, pictures[-1].end
            times = [shown.begins for shown in pictures]
        else:
            with opened(path, threads=1) as source:
                first = next(source.pictures, None)
            if first is None:
                raise InputError(f"{item.key} has no frames")
            size, times, end = first.size, frame_times(path), None
    stop = len(times) if wanted.stop is None else wanted.stop
    if not wanted.start < stop <= len(times):
        raise InputError(f"{item.key} has {len(times)} frames, not frames {wanted}")
    return ClipSize(height=size[0], width=size[1], frames=_count(times[wanted.start : stop], end, fps))


def _count(times: Sequence[Fraction | None], end: Fraction | None, fps: Fraction | None) -> int:
    """How many frames a clip has at a rate."""
    if fps is None or len(times) == 1:
        return len(times)
    first, last = times[0], times[-1]
    if first is None or last is None:
        first, last, end = Fraction(0), Fraction(len(times) - 1) / _ASSUMED, None
    gap = (last - first) / (len(times) - 1)
    return max(1, int(((end or last + gap) - first) * fps + _SLACK))


_SLACK = Fraction(1, 4)
"""Of a frame: rounded times and lasting times must not cost one."""


def choose(seen: ClipSize, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose shape is nearest, of those the one of most frames, of those the largest without enlarging.

    A clip becomes an image only where there is no bucket for clips that it could go to.

    Raises:
        InputError: the clip has fewer frames than any bucket.
    """
    able = [bucket for bucket in buckets if bucket.frames <= seen.frames]
    if not able:
        least = min(bucket.frames for bucket in buckets)
        raise InputError(f"it has {counted(seen.frames, 'frame')} at this rate, and the shortest bucket has {least}")
    able = [bucket for bucket in able if bucket.frames > 1] or able

    def order(bucket: Bucket) -> tuple[float, int, bool, int]:
        shape = abs(log(bucket.height / bucket.width) - log(seen.height / seen.width))
        area = bucket.height * bucket.width
        enlarged = area > seen.height * seen.width
        return round(shape, 6), -bucket.frames, enlarged, area if enlarged else -area

    return min(able, key=order)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A clip as it goes into the VAE, and what was done to get there."""

    pixels: NDArray[np.uint8]
    """(frames, height, width, 3), RGB."""
    fps: Fraction
    times: tuple[int, ...]
    """As in `media.Clip`."""
    done: dict[str, Any]
    """For JSON: the size of the source, what of a picture is kept in its pixels, and the numbers of its frames."""


def take(item: Item, bucket: Bucket, fps: Fraction | None, pixels: NDArray[np.uint8] | None = None) -> Taken:
    """Decode, sample, scale and crop a clip.

    Args:
        item: the clip.
        bucket: the size to bring it to.
        fps: the rate to sample at, where each moment shows the frame that a player shows; None: each frame.
        pixels: what is filled; None: a new array.

    Raises:
        InputError: it can't be decoded up to the last frame that is wanted.
    """
    target, wanted = (bucket.height, bucket.width), item.range
    pixels = np.empty((bucket.frames, *target, 3), np.uint8) if pixels is None else pixels
    numbers: list[int] = []
    begins: list[Fraction | None] = []
    size, end = (0, 0), None
    # One thread: other clips are read at the same time.
    with item.file() as path, opened(path, threads=1) as source:
        for number, shown, times in _sampled(source, wanted, fps):
            if not numbers:
                size = shown.size
            pixels[len(numbers) : len(numbers) + times] = cover(shown.picture, target)
            for _ in range(min(times, bucket.frames - len(numbers))):
                numbers.append(number)
                begins.append(shown.begins)
            end = shown.end
            if len(numbers) == bucket.frames:
                break
        if len(numbers) < bucket.frames:
            raise InputError(f"{item.key} has {len(numbers)} frames that can be taken, and not {bucket.frames}")
        pace = pace_of(source, begins, end) if fps is None or source.is_still else None
    done = {
        "source_size": list(size),
        "crop": [round(edge, 3) for edge in covered(size, target)],
        "source_frames": numbers,
        "bucket": [bucket.frames, bucket.height, bucket.width],
    }
    rate, uneven = (pace.fps, pace.times) if pace is not None else (fps or _ASSUMED, ())
    return Taken(pixels=pixels, fps=rate, times=uneven, done=done)


def _sampled(source: OpenedFile, wanted: FrameRange, fps: Fraction | None) -> Iterator[tuple[int, Shown, int]]:
    """Number, picture and how often it is taken, of each frame that is."""
    rate = source.rates[0] if source.rates else _ASSUMED
    first: Fraction | None = None
    before: tuple[int, Shown, Fraction] | None = None
    taken = 0
    for number, shown in enumerate(source.pictures):
        if number < wanted.start:
            continue
        if wanted.stop is not None and number >= wanted.stop:
            break
        if fps is None or source.is_still:
            yield number, shown, 1
            continue
        begins = Fraction(number) / rate if shown.begins is None else shown.begins
        first = begins if first is None else first
        if before is not None:
            due = _due(begins - first, fps) - taken
            if due > 0:
                taken += due
                yield before[0], before[1], due
        before = number, shown, begins
    if before is not None and fps is not None and first is not None:
        lasts = before[1].lasts or 1 / rate
        due = int((before[2] + lasts - first) * fps + _SLACK) - taken
        if due > 0 or not taken:
            yield before[0], before[1], max(due, 1)


def _due(seconds: Fraction, fps: Fraction) -> int:
    """How many moments of a rate lie before a time, with a hair's breadth for times that are rounded."""
    return max(0, ceil(seconds * fps - Fraction(1, 100)))
