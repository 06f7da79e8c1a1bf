"""Shards, or each rank by itself: a picture may be so small that messages take longer than shards save.

Which is faster is not reasoned about. Both are tried once for each kind of call, and the times are kept on disk.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch

from halovae.base import verdicts
from halovae.base.files import first_line
from halovae.base.trees import map_tensors, pictures_in, tensors_in
from halovae.calls.blueprint import words_of
from halovae.calls.device_graphs import can_record
from halovae.calls.merge_steps import FULL_CALL
from halovae.calls.randomness import Generators
from halovae.calls.replay import is_hooked, timed
from halovae.calls.state import unchanged
from halovae.calls.target import Target
from halovae.calls.verify import allowed, distance
from halovae.comm import Comm, backend_name
from halovae.comm.agreement import verdict_of_all
from halovae.exact.run import first_tensor, packed

LOG = logging.getLogger("halovae")

_SETTLED = 3
"""The call with which the trial is made: in the first one kernels are compiled, and the second may be recorded."""
_SMALL = 0.5
"""Seconds on shards up to which there is a trial: of longer calls it would be felt. Slow messages count among them."""
_LONGEST = 4.0
"""Seconds after which a trial is broken off."""
_COLD = 2
"""Rounds on a device that records in which a call alone is not yet a replay."""
_ROUNDS = 3
"""Of both ways in turn, besides."""
_CLEAR = 1.5
"""Times as long as the other way: two rounds are enough."""
_GAIN = 0.97
"""Alone has to take less than this part of the time on shards: less gain is within what two calls differ by."""


class HasResult(Protocol):
    @property
    def result(self) -> Any: ...


T = TypeVar("T", bound=HasResult)
Way = Callable[[tuple[Any, ...], dict[str, Any]], T]
"""Makes a call with these arguments."""


@dataclass
class _Kind:
    """Calls of one kind."""

    name: str | None
    """Of the verdict on disk."""
    calls: int = 0
    """Made while it was not decided."""
    is_alone: bool | None = None
    """How they are made; None: it is not decided."""
    words: str = ""
    """Why."""


class Contest:
    """Decides for each kind of call whether ranks make it alone. Every rank of the group makes one.

    Args:
        comm: the group.
        always: alone wherever that can be; else where it is faster.
        question: what the times depend on besides the call and the group.

    Attributes:
        is_alone: whether calls like the last one are made alone from here on.
        words: why the last call was made alone, or nothing.
        seconds: that the trial in the last call took.
    """

    def __init__(self, comm: Comm, target: Target, always: bool, question: Sequence[object]) -> None:
        self._comm, self._target, self._always, self._question = comm, target, always, question
        self._kinds: dict[Any, _Kind] = {}
        self.begin()

    def begin(self) -> None:
        """Before a call."""
        self.is_alone, self.words, self.seconds = False, "", 0.0
        self._at_risk: _Kind | None = None

    @property
    def is_at_risk(self) -> bool:
        """Whether the last call may have needed memory beyond what shards need; the same on all ranks."""
        return self._at_risk is not None

    def give_up(self) -> bool:
        """After memory has run out on a rank: whether such a call is to be made again, on shards from here on."""
        kind, self._at_risk = self._at_risk, None
        if kind is None:
            return False
        kind.is_alone = False
        LOG.warning("%s: memory is short for calls of each rank alone, they are made on shards", self._target.name)
        return True

    def settled(self) -> int:
        """How many steps ranks have gone together."""
        return sum(kind.calls + (kind.is_alone is not None) for kind in self._kinds.values())

    def forget(self) -> None:
        self._kinds.clear()

    def run(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, keep: str, shards: Way[T], alone: Way[T],
        trial: Way[T],
    ) -> T:  # fmt: skip
        """A call, in the way that is the faster one as far as it is known; the same way on all ranks.

        Args:
            keep: which ranks get the whole result: "all" or "first".
            shards: makes it on shards.
            alone: makes it alone on the ranks that get the result; the others get what they get of it.
            trial: as `alone`, without an exchange. Called on the ranks that get the result.
        """
        kind = self._kind(half, args, kwargs, keep)
        if kind.is_alone is False or (kind.is_alone is None and kind.calls < _SETTLED):
            return shards(args, kwargs)
        self._at_risk = kind  # Before anything that may fail on one rank alone: the others know no less.
        if kind.is_alone:
            self.is_alone, self.words = True, kind.words
            return alone(args, kwargs)
        given, device = (args, kwargs), tensors_in((args, kwargs))[0].device
        ran, seconds = timed(self._comm, device, lambda: shards(args, kwargs))
        kind.is_alone = False  # Until it has turned out well: what fails in here is not to fail each time.
        traffic = self._comm.traffic

        def compare() -> None:
            problem = self._compare(kind, keep, shards, trial, given, ran, seconds)
            if problem:
                LOG.debug("%s of %s stays on shards: %s", half, self._target.name, problem)

        with unchanged(self._target.facts):
            _, self.seconds = timed(self._comm, device, compare)
        self._comm.traffic, self.is_alone = traffic, bool(kind.is_alone)
        if kind.is_alone:
            LOG.info("%s of %s: from now on each rank makes such calls alone (%s)", half, self._target.name, kind.words)
        return ran

    def _kind(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], keep: str) -> _Kind:
        key = keep, self._target.kind(half, args, kwargs)
        if key not in self._kinds:
            words = None if torch.are_deterministic_algorithms_enabled() else words_of(self._target, half, args, kwargs)
            device, on_host = tensors_in((args, kwargs))[0].device, os.environ.get("LOCAL_WORLD_SIZE")
            group = self._comm.size, on_host, backend_name(), keep
            kind = _Kind(words and verdicts.name_of(device, "alone", *group, *self._question, words))
            times = verdict_of_all(self._comm, kind.name)
            if isinstance(times, list) and [*map(type, cast("list[Any]", times))] == [float, float]:
                self._decide(kind, *cast("list[float]", times))
            self._kinds[key] = kind
        kind = self._kinds[key]
        kind.calls += kind.is_alone is None
        return kind

    def _decide(self, kind: _Kind, alone: float, shards: float) -> None:
        kind.is_alone = self._always or alone < _GAIN * shards
        kind.words = f"{1e3 * alone:.1f} ms, on shards {1e3 * shards:.1f} ms"

    def _compare(
        self, kind: _Kind, keep: str, shards: Way[T], trial: Way[T], given: Any, ran: T, seconds: float
    ) -> str:  # fmt: skip
        """Both ways in turn, begun by all ranks at once. Gives why it was broken off, or nothing."""
        device, times = tensors_in(given)[0].device, list[tuple[float, float]]()
        cold = _COLD if can_record(device) else 0
        problem, on_shards = self._told(self._obstacle(given, ran), seconds)
        if not self._always and on_shards > _SMALL:
            problem = problem or f"it takes {on_shards:.3f} s"
        while not problem and needs_more(times[cold:]):
            problem, alone = self._told(*self._timed_alone(keep, trial, given, ran))
            if problem:
                break
            _, seconds = timed(self._comm, device, lambda: shards(*given))
            times.append((alone, self._told("", seconds)[1]))
            if self._always:
                break
            if sum(map(sum, times)) > _LONGEST and len(times) <= cold:
                problem = "the trial takes too long"
        if problem:
            return problem
        best = [min(each) for each in zip(*(times[cold:] or times), strict=True)]
        self._decide(kind, *best)
        if self._comm.rank == 0 and not self._always:
            verdicts.write(kind.name, best)
        return ""

    def _told(self, problem: str, seconds: float) -> tuple[str, float]:
        """The first problem that a rank has, and the time of the slowest."""
        everyone = self._comm.all_gather_object((problem, seconds))
        problems = (f"rank {rank}: {words}" for rank, (words, _) in enumerate(everyone) if words)
        return next(problems, ""), max(seconds for _, seconds in everyone)

    def _obstacle(self, given: Any, ran: HasResult) -> str:
        """Why there is no trial, as far as this rank knows."""
        if torch.are_deterministic_algorithms_enabled():
            return "deterministic algorithms are asked for, and bits may change"
        if self._always:
            return ""
        if max(tensor.numel() for tensor in pictures_in((given, ran.result))) > FULL_CALL * self._comm.size:
            return "shards are large"
        return "hooks hang on the VAE" if is_hooked(self._target.vae) else ""

    def _timed_alone(self, keep: str, trial: Way[T], given: Any, ran: T) -> tuple[str, float]:
        """Why this rank can't make the call alone, or nothing; and its seconds. Sends nothing, so it may fail."""
        if keep == "first" and self._comm.rank > 0:
            return "", 0.0
        args, kwargs = map_tensors(torch.clone, given)
        device = tensors_in(given)[0].device
        generators = Generators(device, args, kwargs)
        try:
            with unchanged(self._target.facts) as before:
                found, seconds = timed(self._comm, device, lambda: trial(args, kwargs))
                if before.has_gone_on():
                    return "it leaves something behind", seconds
            if generators.have_drawn():
                return "it draws random numbers, which ranks have to share", seconds
            if not all(map(torch.equal, tensors_in((args, kwargs)), tensors_in(given))):
                return "it writes into its arguments", seconds
            expected = first_tensor(ran.result)
            if distance(first_tensor(found.result), expected) > allowed(expected):
                return "the result is another one", seconds
            if keep == "first":
                packed(found.result, {}, keep)  # The others can be told of it.
            return "", seconds
        except Exception as error:
            self._comm.check()  # What another rank's failure has broken is no problem of this one.
            problem = f"{type(error).__name__}: {first_line(error)}"
        finally:
            generators.rewind()
        gc.collect()  # What the attempt held: its frames are in a cycle with its exception.
        return problem, 0.0


def needs_more(times: Sequence[tuple[float, float]]) -> bool:
    """Whether another round may tell more.

    Args:
        times: seconds of the slowest rank, alone and on shards, of each round that counts.
    """
    if len(times) < 2:
        return True
    alone, shards = map(min, zip(*times, strict=True))
    return len(times) < _ROUNDS and max(alone, shards) < _CLEAR * min(alone, shards)
