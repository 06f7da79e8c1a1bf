"""A video that is longer than memory: its frames are decoded when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from halovae.errors import InputError
from halovae.files import check_input
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
        self.count = 0
        self.size = (0, 0)
        """Height and width of the first frame, which the others are scaled to."""
        self._part: tuple[int, int, int] | None = None
        with opened(path) as (source, self.fps, _):
            for picture in source:
                self.size = self.size if self.count else (picture.height, picture.width)
                self.count += 1
                advance()
        if not self.count:
            raise InputError(f"{path} has no frames")

    def trim(self, count: int, height: int, width: int) -> None:
        """Keep the first frames only, and of them the middle."""
        self._part = count, height, width

    def __iter__(self) -> Iterator[Frame]:
        count, height, width = self._part or (self.count, *self.size)
        top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
        with opened(self._path) as (source, _, _):
            for picture in islice(source, count):
                yield cover(picture, self.size)[top : top + height, left : left + width]
