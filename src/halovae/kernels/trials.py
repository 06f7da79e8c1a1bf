"""What is found out by trying: which of two ways is faster on this processor, since processors differ.

Ranks that work on one picture have to choose alike: else each of them waits, at the halo of every layer, for the one
that chose worse there. Two ways of about the same speed are enough for that.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from halovae.base import verdicts
from halovae.base.forks import free_in_children
from halovae.base.private_torch import without_functions, without_modes
from halovae.kernels.autocast import off
from halovae.kernels.kept import kept

Way = Callable[[], object]
Gains = Mapping[Hashable, float]
"""How many times as fast the second of two ways is, by question."""

_TICK = 1e-9
"""Seconds that a run takes at the least: some clocks stand still for milliseconds."""

_timed_here: dict[Hashable, float] = {}
"""What this process has timed; handles begin with it, and then agree with the ranks of their group."""
_one_at_a_time = free_in_children(threading.Lock())


def gain(question: Hashable, ways: Callable[[], tuple[Way, Way]]) -> float:
    """How many times as fast the second of two ways is as the first.

    Timed once on a machine, for some ten milliseconds, or taken over from others (`adopt`). Kept for each handle, and
    on disk.

    Args:
        ways: prepares them. Modes do not see what it or they call.
    """
    gains = kept().gains
    if question not in gains:
        with _one_at_a_time:
            if question not in _timed_here:
                _timed_here[question] = _found_out(question, ways)
        gains[question] = _timed_here[question]
    return gains[question]


def _found_out(question: Hashable, ways: Callable[[], tuple[Way, Way]]) -> float:
    """By a process before this one on such a machine, or now: torch runs without the modes around, which take time."""
    kept_on_disk = verdicts.read(_name(question))
    if isinstance(kept_on_disk, float) and kept_on_disk > 0:
        return kept_on_disk
    with without_modes(), off(), torch.inference_mode(), without_functions():
        first, second = _seconds(ways())
    verdicts.write(_name(question), first / second)
    return first / second


def _name(question: Hashable) -> str | None:
    return verdicts.name_of(torch.device("cpu"), "gain", question)


def known() -> Gains:
    """All that this handle has found out."""
    return dict(kept().gains)


def adopt(everyone: Sequence[Gains]) -> bool:
    """Take over what the ranks of a group have found out, so that all of them answer alike: the geometric mean.

    Returns:
        Whether this handle had other answers before.
    """
    before, answers = known(), kept().gains
    for question in {question for gains in everyone for question in gains}:
        found = [gains[question] for gains in everyone if question in gains]
        answers[question] = found[0]
        # A mean of equal numbers may be another one by a rounding.
        if len(set(found)) > 1:
            answers[question] = statistics.geometric_mean(found)
            verdicts.write(_name(question), answers[question])  # The next processes choose as these ranks do.
    return known() != before


def _seconds(ways: Sequence[Way]) -> list[float]:
    """The least of five runs of each, in turns; in processor time, which other work disturbs less than the clock."""
    turns = [[_timed(way) for way in ways] for _ in range(5)]
    return [min(times) for times in zip(*turns, strict=True)]


def _timed(way: Way) -> float:
    started = time.thread_time()
    way()
    return max(time.thread_time() - started, _TICK)
