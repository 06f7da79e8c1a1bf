"""What this process did and when: spans that the layers above note, kept only while somebody records.

Times are those of `time.perf_counter`, on the host: work that an accelerator still has in its queue is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """One thing done."""

    name: str
    """"encode" or "decode": a whole call, or another part of a pipeline, "denoise" or "text". Within a call "agree",
    "probe" (what only the first call of its kind does), "network" and "gather", one after the other; within these
    "wait" (for messages) and "blend"."""
    start: float
    """Seconds since the recording began."""
    end: float


@dataclass
class Timeline:
    """The spans of one recording, in the order in which they ended."""

    origin: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list[Span])


_current: ContextVar[Timeline | None] = ContextVar("halovae_timeline", default=None)


@contextmanager
def recording() -> Iterator[Timeline]:
    """Within it, this thread's spans are kept. Those of ranks that begin right after a common exchange fit together."""
    timeline = Timeline()
    before = _current.set(timeline)
    try:
        yield timeline
    finally:
        _current.reset(before)


def note(name: str, start: float, end: float | None = None) -> None:
    """Keep a span, if there is a recording."""
    timeline = _current.get()
    if timeline is not None:
        end = time.perf_counter() if end is None else end
        timeline.spans.append(Span(name, start - timeline.origin, end - timeline.origin))


@contextmanager
def span(name: str) -> Iterator[None]:
    """Note what is done within it."""
    start = time.perf_counter()
    try:
        yield
    finally:
        note(name, start)
