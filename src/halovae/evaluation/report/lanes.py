"""The timeline: what each rank did at every moment, as seconds in all and as shares of short intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halovae.base.timeline import Span

KINDS = {
    "encode": "encoding",
    "decode": "decoding",
    "denoise": "denoising",
    "text": "reading the prompt",
    "wait": "waiting for others",
    "gather": "gathering",
    "blend": "blending tiles",
    "agree": "agreeing",
    "other": "other",
    "probe": "first-call set-up",
}
"""What a rank can be doing, and its name on the page."""
WHOLES = {"encode": "encode", "decode": "decode", "denoise": "denoise", "text": "prompt"}
"""Not a part of something else. A pipeline that encodes while it denoises is encoding."""
INTERVALS = 240


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One rank's part of the timeline."""

    rank: int
    parts: dict[str, dict[str, float]]
    """Seconds of each whole, such as "encode", by kind; those that there were."""
    shares: tuple[dict[str, float], ...]
    """By kind, for each of `INTERVALS` equal parts of the whole time: how much of it, 0 to 1."""

    @property
    def seconds(self) -> dict[str, float]:
        """By kind, of all wholes together."""
        total: defaultdict[str, float] = defaultdict(float)
        for part in self.parts.values():
            for kind, seconds in part.items():
                total[kind] += seconds
        return dict(total)

    @property
    def working(self) -> float:
        """Seconds of work, without waiting for others."""
        return sum(part.get(whole, 0.0) for whole, part in self.parts.items())

    def rows(self) -> list[tuple[str, float, float, dict[str, float]]]:
        """Of each whole the name, the seconds as every other place has them (without what only a first call does),
        those of the rank's own work, and its parts by kind."""
        return [
            (name, sum(part.values()) - part.get("probe", 0.0), part.get(whole, 0.0), part)
            for whole, name in WHOLES.items()
            if (part := self.parts.get(whole))
        ]

    def to_dict(self) -> dict[str, Any]:
        shares = [{kind: round(share, 4) for kind, share in part.items()} for part in self.shares]
        return {"rank": self.rank, "seconds": self.seconds, "parts": self.parts, "shares": shares}


def lanes(ranks: Sequence[Sequence[Span]]) -> tuple[float, list[Lane]]:
    """Seconds from the first span to the last, and a lane for each rank. Their recordings began at the same moment."""
    whole = [span for spans in ranks for span in spans if span.name in WHOLES]
    if not whole:
        return 0.0, []
    start, end = min(span.start for span in whole), max(span.end for span in whole)
    return end - start, [_lane(rank, spans, start, end) for rank, spans in enumerate(ranks)]


def balance(found: Sequence[Lane]) -> float:
    """Largest over mean seconds of work: 1 where all ranks had as much to do."""
    working = [lane.working for lane in found]
    return max(working) * len(working) / sum(working) if sum(working) else 1.0


def _lane(rank: int, spans: Sequence[Span], start: float, end: float) -> Lane:
    parts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    shares = [defaultdict[str, float](float) for _ in range(INTERVALS)]
    length = (end - start) / INTERVALS
    for whole, kind, low, high in _segments(spans):
        parts[whole][kind] += high - low
        first, last = int((low - start) / length), min(INTERVALS - 1, int((high - start) / length))
        for index in range(max(0, first), last + 1):
            begin = start + index * length
            shares[index][kind] += max(0.0, min(high, begin + length) - max(low, begin)) / length
    seconds = {whole: dict(part) for whole, part in parts.items()}
    return Lane(rank=rank, parts=seconds, shares=tuple(map(dict, shares)))


def _segments(spans: Sequence[Span]) -> Iterator[tuple[str, str, float, float]]:
    """Within which whole the rank was doing what from when to when, with no two at a time."""
    has_phases = any(span.name == "network" for span in spans)
    edges = sorted([(span.start, 1, span.name) for span in spans] + [(span.end, -1, span.name) for span in spans])
    active: Counter[str] = Counter()
    before = 0.0
    for when, change, name in edges:
        whole = next((name for name in WHOLES if active[name]), None)
        if whole is not None and when > before:
            yield whole, _kind(whole, active, has_phases), before, when
        active[name] += change
        before = when


def _kind(whole: str, active: Counter[str], has_phases: bool) -> str:
    if whole not in ("encode", "decode"):
        return whole
    for inner in ("blend", "agree", "probe", "gather"):
        if active[inner]:
            return inner
    if has_phases and not active["network"]:
        return "other"
    return "wait" if active["wait"] else whole
