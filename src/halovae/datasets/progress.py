"""What a person sees of a run on a dataset: how far it is, and what it did."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

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


class Progress:
    """Items, frames per second and the time that is left: a bar in a terminal, else a line now and then."""

    def __init__(self, notes: Stages, units: Sequence[Unit]) -> None:
        self._notes = notes
        self._items = sum(len(unit.keys) for unit in units)
        self._work = sum(unit.bucket.pixels * len(unit.keys) for unit in units)
        self._done, self._worked, self._frames = 0, 0, 0
        self._started = self._said = time.perf_counter()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            columns = TextColumn("encode"), BarColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._words(), total=self._work)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, unit: Unit, items: int, frames: int) -> None:
        self._done += items
        self._worked += items * unit.bucket.pixels
        self._frames += frames
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._worked, description=self._words())
        elif now - self._said > _SAY_EVERY:
            self._said = now
            self._notes.note(self._words())

    def _words(self) -> str:
        seconds = time.perf_counter() - self._started
        words = f"{self._done} of {counted(self._items, 'item')}"
        if self._worked:
            left = timedelta(seconds=round(seconds * (self._work - self._worked) / self._worked))
            words += f", {self._frames / seconds:.1f} frames/s, {left} left"
        return words


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
