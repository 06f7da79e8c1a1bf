"""What a caller asks of a clip, without any of the libraries that read one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halovae.base.errors import InputError


@dataclass(frozen=True)
class FrameRange:
    """Frames `start` to `stop` - 1, counted from 0. `stop` None means to the end."""

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise InputError(f"--frames {self}: A:B needs 0 <= A < B")

    @classmethod
    def parse(cls, text: str) -> FrameRange:
        """From "A:B", "A:" or ":B".

        Raises:
            InputError: another form, or no frame in the range.
        """
        match = re.fullmatch(r"(\d{0,12}):(\d{0,12})", text)
        if match is None:
            raise InputError(f"--frames {text}: give A:B, A: or :B, as in 0:33")
        start, stop = match.groups()
        return cls(int(start or 0), int(stop) if stop else None)

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"
