"""What a user sees while waiting: a bar on a terminal's standard error, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_CLEAR_LINE = "\x1b[K"


class Stages:
    """The stages of a run, one at a time.

    Args:
        speaks: whether this process talks to the user: of several ranks one does.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._shows = speaks and sys.stderr.isatty()
        if self._shows:
            sys.stderr.write(_CLEAR_LINE)

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
        """Show `name` while in it; yields what to call after each of `steps` (None: their number is unknown)."""
        if not self._shows:
            yield lambda: None
            return
        columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            # One step is all or nothing: then a bar that moves says more than one that stays empty.
            task = progress.add_task(name, total=None if steps == 1 else steps)
            yield lambda: progress.advance(task)

    def note(self, text: str) -> None:
        """Tell the user what else has happened, on a line of its own."""
        if self._speaks:
            sys.stderr.write(f"halovae: note: {text}\n")
