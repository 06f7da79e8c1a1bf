"""The timeline: what each rank did at every moment, as seconds in all and as shares of short intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halovae.timeline import Span

KINDS = {
    "encode": "encode",
    "decode": "decode",
    "denoise": "denoise",
    "text": "prompt",
    "wait": "halo wait",
    "gather": "gather",
    "blend": "blend",
    "agree": "agree",
    "probe": "probe",
    "other": "other",
}
"""What a rank can be doing, and its name on the page."""
_WHOLE = ("encode", "decode", "denoise", "text")
"""Not a part of something else. A pipeline that encodes while it denoises is encoding."""
INTERVALS = 240


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One rank's part of the timeline."""

    rank: int
    seconds: dict[str, float]
    """By kind, those that there were."""
    shares: tuple[dict[str, float], ...]
    """By kind, for each of `INTERVALS` equal parts of the whole time: how much of it, 0 to 1."""

    @property
    def working(self) -> float:
        """Seconds of work, without waiting for others."""
        return sum(self.seconds.get(kind, 0.0) for kind in _WHOLE)

    def to_dict(self) -> dict[str, Any]:
        shares = [{kind: round(share, 4) for kind, share in part.items()} for part in self.shares]
        return {"rank": self.rank, "seconds": self.seconds, "shares": shares}


def lanes(ranks: Sequence[Sequence[Span]]) -> tuple[float, list[Lane]]:
    """Seconds from the first span to the last, and a lane for each rank.

    Args:
        ranks: each rank's spans, of recordings that began at the same moment.
    """
    whole = [span for spans in ranks for span in spans if span.name in _WHOLE]
    if not whole:
        return 0.0, []
    start, end = min(span.start for span in whole), max(span.end for span in whole)
    return end - start, [_lane(rank, spans, start, end) for rank, spans in enumerate(ranks)]


def balance(found: Sequence[Lane]) -> float:
    """Largest over mean seconds of work: 1 where all ranks had as much to do."""
    working = [lane.working for lane in found]
    return max(working) * len(working) / sum(working) if sum(working) else 1.0


def _lane(rank: int, spans: Sequence[Span], start: float, end: float) -> Lane:
    seconds: defaultdict[str, float] = defaultdict(float)
    parts = [defaultdict[str, float](float) for _ in range(INTERVALS)]
    length = (end - start) / INTERVALS
    for kind, low, high in _segments(spans):
        seconds[kind] += high - low
        first, last = int((low - start) / length), min(INTERVALS - 1, int((high - start) / length))
        for index in range(max(0, first), last + 1):
            begin = start + index * length
            parts[index][kind] += max(0.0, min(high, begin + length) - max(low, begin)) / length
    return Lane(rank=rank, seconds=dict(seconds), shares=tuple(map(dict, parts)))


def _segments(spans: Sequence[Span]) -> Iterator[tuple[str, float, float]]:
    """What the rank was doing from when to when, with no two at a time."""
    has_phases = any(span.name == "network" for span in spans)
    edges = sorted([(span.start, 1, span.name) for span in spans] + [(span.end, -1, span.name) for span in spans])
    active: Counter[str] = Counter()
    before = 0.0
    for when, change, name in edges:
        kind = _kind(active, has_phases)
        if kind is not None and when > before:
            yield kind, before, when
        active[name] += change
        before = when


def _kind(active: Counter[str], has_phases: bool) -> str | None:
    half = next((name for name in _WHOLE if active[name]), None)
    if half not in ("encode", "decode"):
        return half
    for inner in ("blend", "agree", "probe", "gather"):
        if active[inner]:
            return inner
    if has_phases and not active["network"]:
        return "other"
    return "wait" if active["wait"] else half
