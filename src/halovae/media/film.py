"""A video that is longer than memory: its frames are decoded when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

from halovae.base.errors import InputError
from halovae.base.files import check_input
from halovae.media.pace import pace_of
from halovae.media.reader import Frame, cover, opened


class Film:
    """A video or an image whose frames are decoded anew each time they are gone through, and not kept.

    Args:
        path: a video or an image.
        advance: called after each frame while they are counted, at first.

    Raises:
        InputError: the file can't be read whole.
    """

    def __init__(self, path: Path, advance: Callable[[], None] = lambda: None) -> None:
        check_input(path)
        self._path = path
        self.size = (0, 0)
        """Height and width of the first frame, which the others are scaled to."""
        self._part: tuple[int, int, int] | None = None
        begins: list[Fraction | None] = []
        end: Fraction | None = None
        with opened(path) as source:
            for shown in source.pictures:
                self.size = self.size if begins else (shown.picture.height, shown.picture.width)
                begins.append(shown.begins)
                end = shown.end
                advance()
        if not begins:
            raise InputError(f"{path} has no frames")
        self.count = len(begins)
        self.lossy = source.lossy
        """What it was compressed with, where that may have lost something."""
        self.pace = pace_of(source, begins, end)

    def trim(self, count: int, height: int, width: int) -> None:
        """Keep the first frames only, and of them the middle."""
        self._part = count, height, width

    def __iter__(self) -> Iterator[Frame]:
        count, height, width = self._part or (self.count, *self.size)
        top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
        with opened(self._path) as source:
            for shown in islice(source.pictures, count):
                yield cover(shown.picture, self.size)[top : top + height, left : left + width]
