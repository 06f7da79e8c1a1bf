"""What a person sees of a run on a dataset: how far it is, and what it did."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from halovae.app.session import Stages
from halovae.app.tables import counted
from halovae.datasets.manifest import FAILED
from halovae.datasets.units import Unit

_SAY_EVERY = 60.0
"""Seconds between two lines on the progress, where there is no terminal."""


@dataclass(kw_only=True)
class Done:
    """What a run did."""

    items: int
    """In the dataset."""
    encoded: int = 0
    there: int = 0
    """Finished by an earlier run."""
    failed: int = 0
    frames: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    """Share of the time that devices encoded."""
    groups: dict[str, int] = field(default_factory=dict[str, int])
    """Devices that clips of a bucket were encoded on."""

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "frames_per_second": self.rate}


@contextmanager
def progress(notes: Stages, units: Sequence[Unit]) -> Iterator[Callable[[int], None]]:
    """Within it, a terminal shows how many frames are done; where there is none, a line tells it now and then.

    Yields what to call with the number of frames that are done more.
    """
    items = counted(sum(len(unit.keys) for unit in units), "item")
    total, done = sum(len(unit.keys) * unit.bucket.frames for unit in units), 0
    started = said = time.perf_counter()
    with notes.stage(f"encode {items}", total, "frames") as advance:

        def tell(frames: int) -> None:
            nonlocal done, said
            advance(frames)
            done += frames
            now = time.perf_counter()
            if done and now - said > _SAY_EVERY and not sys.stderr.isatty():
                rate, said = done / (now - started), now
                left = timedelta(seconds=round((total - done) / rate))
                notes.note(f"{done} of {total} frames of {items}, {rate:.1f} frames/s, {left} left")

        yield tell


def summary(done: Done, output: Path) -> str:
    """What a user reads at the end."""
    lines = [
        f"{output}: {counted(done.items, 'item')}: {done.encoded} encoded, {done.there} there already, "
        f"{done.failed} failed" + (f" (see {output / FAILED})" if done.failed else "")
    ]
    if done.encoded:
        took = timedelta(seconds=round(done.seconds))
        lines.append(f"{took}, {done.rate:.1f} frames/s, devices busy {100 * done.busy:.0f} %")
    return "\n".join(lines)
