"""Tiles of one shape in one call of the network, where that is faster: one by one they are too little for a device.

What a batch gives differs from single tiles by the rounding of other kernels. Whether a network takes tiles together
at all, and what it gains, is found out by trying on the first of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.compiled import is_compiled
from halovae.base.errors import HalovaeError
from halovae.base.memory import allocated_by, free_bytes, is_shortage
from halovae.base.private_torch import pytree
from halovae.base.trees import map_tensors, tensors_in
from halovae.calls.record import NetworkCall
from halovae.calls.state import has_hooks
from halovae.calls.verify import is_rounding
from halovae.kernels import autocast
from halovae.kernels.fast_mode import FastMode, finished

MOST = 16
"""Tiles in one call. From here on the products of a large decoder get no faster (measured on an H200)."""
GAIN = 1.1
"""How many times as fast it has to be, to give up the bits of the VAE's own calls."""
ENOUGH = 0.97
"""A batch takes memory for each of its tiles: it has to take less than this part of their time one by one."""
SHARE = 0.5
"""Of the free memory that a batch may take."""
TRIED = 4
"""Tiles of the trial."""


@dataclass(frozen=True)
class BatchVerdict:
    """How tiles of one kind are run."""

    tiles: int
    """In one call."""
    same_bits: bool
    """Whether results are, bit for bit, those of the VAE's own calls."""
    is_fast: bool = True
    """Whether kernels of our own take part."""
    fewer: tuple[int, float] | None = None
    """Where so many tiles are on trial: how many were better so far, and the seconds of each of those."""
    most: int = 1
    """That there is memory for."""

    def judged(self, seconds: float) -> BatchVerdict:
        """After so many tiles took these seconds each: more of them, where that gained, else fewer."""
        assert self.fewer is not None, "they are not on trial"
        fewer, before = self.fewer
        if seconds >= ENOUGH * before:
            return replace(self, tiles=fewer, fewer=None)
        return self.tried_on(seconds)

    def tried_on(self, seconds: float) -> BatchVerdict:
        """With twice as many tiles on trial, if there may be more."""
        more = min(2 * self.tiles, self.most)
        return replace(self, tiles=more, fewer=(self.tiles, seconds) if more > self.tiles else None)


ALONE = BatchVerdict(1, same_bits=True, is_fast=False)
"""As the VAE itself calls its network."""


@dataclass(frozen=True)
class _Waiting:
    """A call whose turn has not come."""

    number: int
    leaves: list[Any]
    """Of its arguments; tensors in copies, since the VAE may write into its own."""
    structure: Any

    def run(self, network: nn.Module) -> Any:
        args, kwargs = pytree.tree_unflatten(self.leaves, self.structure)
        return network(*args, **kwargs)


class Batches:
    """Runs the calls of one rank, several of a kind in one.

    Calls that go on with what others have left or leave something for others, or that draw random numbers, are run by
    themselves, as are all on a CPU and those of a network with hooks, which would see other tensors.

    Args:
        calls: of the whole encode or decode.
        mine: the numbers of those that this rank runs.
        verdicts: what is known already, by kind of call; it grows.
        gives: the numbers of those that leave something for calls of a later stage.
    """

    def __init__(
        self, network: nn.Module, calls: tuple[NetworkCall, ...], mine: set[int], device: torch.device,
        verdicts: dict[Any, BatchVerdict], same_bits: bool = False, gives: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._network, self._calls, self._device, self._verdicts = network, calls, device, verdicts
        needed = {earlier for call in calls for earlier in call.needs} | {*gives}
        free = {n for n in mine if n not in needed and not calls[n].needs and not calls[n].draws}
        self._free = set[int]() if same_bits or _by_itself(device) or has_hooks(network) else free
        self._left = Counter(calls[n].kind for n in self._free)
        self._waiting: dict[int, list[_Waiting]] = {}

    def run(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
        """Take a call in. What the network gives for it and for others comes with the last one of its batch.

        Returns:
            Results by the numbers of their calls.
        """
        if number not in self._free:
            return {number: self._network(*args, **kwargs)}
        key = _key(args, kwargs)
        verdict = self._verdicts.get(key)
        kind = self._calls[number].kind
        waiting = self._waiting.setdefault(kind, [])
        if verdict == ALONE and not waiting:
            self._left[kind] -= 1
            return {number: self._network(*args, **kwargs)}
        waiting.append(_Waiting(number, *pytree.tree_flatten(map_tensors(torch.clone, (args, kwargs)))))
        self._left[kind] -= 1
        if len(waiting) < (verdict.tiles if verdict else TRIED) and self._left[kind]:
            return {}
        self._waiting[kind] = []
        if verdict is None:
            return self._try(waiting, key)
        if verdict == ALONE:  # since these began to wait
            return {one.number: one.run(self._network) for one in waiting}
        try:
            return self._on_trial(waiting, key, verdict)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
        # Others have taken the memory since, or so many tiles are too many.
        self._verdicts[key] = replace(verdict, tiles=verdict.fewer[0], fewer=None) if verdict.fewer else ALONE
        return {one.number: one.run(self._network) for one in waiting}

    def _on_trial(self, waiting: list[_Waiting], key: Any, verdict: BatchVerdict) -> dict[int, Any]:
        if verdict.fewer is None or len(waiting) < verdict.tiles:
            return self._together(waiting)
        found: dict[int, Any] = {}
        seconds = self._seconds(lambda: found.update(self._together(waiting)))
        self._verdicts[key] = verdict.judged(seconds / len(waiting))
        return found

    def _together(self, waiting: list[_Waiting]) -> dict[int, Any]:
        count, size = len(waiting), len(tensors_in(waiting[0].leaves)[0])
        leaves = [_joined(size, places) for places in zip(*(one.leaves for one in waiting), strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, waiting[0].structure)
        with nullcontext() if is_compiled(self._network.modules()) else FastMode():
            result = self._network(*args, **kwargs)
        flat, structure = pytree.tree_flatten(result)
        parts = [_split(finished(leaf), count, size) if isinstance(leaf, Tensor) else [leaf] * count for leaf in flat]
        return {
            one.number: pytree.tree_unflatten(list(leaves), structure)
            for one, leaves in zip(waiting, zip(*parts, strict=True), strict=True)
        }

    def _try(self, waiting: list[_Waiting], key: Any) -> dict[int, Any]:
        """Both ways, on calls that are due anyway; their results are those of single tiles."""
        first, *others = waiting
        singly: dict[int, Any] = {}
        needs = allocated_by(lambda: singly.update({first.number: first.run(self._network)}), self._device)
        seconds = [self._seconds(lambda: singly.update({o.number: o.run(self._network)})) for o in others]  # noqa: B023
        if len(waiting) < TRIED:
            return singly  # too few to tell
        room = free_bytes(self._device)
        most = MOST if room is None else min(MOST, int(SHARE * room / max(needs, 1)))
        self._verdicts[key] = self._judge(waiting[:most], singly, min(seconds), most) if most > 1 else ALONE
        return singly

    def _judge(self, waiting: list[_Waiting], singly: dict[int, Any], seconds: float, most: int) -> BatchVerdict:
        try:
            found = self._together(waiting)  # The first time kernels are made.
            self._together(waiting[:1])
            turns = [(self._seconds_each(waiting), self._seconds_each(waiting[:1])) for _ in range(2)]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, HalovaeError):
                raise
            return ALONE  # What a network does with a batch it may not have been written for.
        batch, single = map(min, zip(*turns, strict=True))
        pairs = [
            (a, b)
            for one in waiting
            for a, b in zip(tensors_in(found[one.number]), tensors_in(singly[one.number]), strict=True)
        ]
        if seconds < GAIN * min(batch, single) or not all(is_rounding(a, b) for a, b in pairs):
            return ALONE
        same_bits = all(torch.equal(a, b) for a, b in pairs)
        if batch >= ENOUGH * single:
            return BatchVerdict(1, same_bits)
        return BatchVerdict(len(waiting), same_bits, most=most).tried_on(batch)

    def _seconds_each(self, waiting: list[_Waiting]) -> float:
        """Of one call, for each of its tiles."""
        return self._seconds(lambda: self._together(waiting)) / len(waiting)

    def _seconds(self, run: Callable[[], object]) -> float:
        torch.accelerator.synchronize(self._device)
        started = time.perf_counter()
        run()
        torch.accelerator.synchronize(self._device)
        return time.perf_counter() - started


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What tells calls that have one verdict."""
    return (*((tuple(t.shape), t.dtype) for t in tensors_in((args, kwargs))), autocast.state())


def _by_itself(device: torch.device) -> bool:
    """Whether one tile is enough for a device."""
    return device.type in ("cpu", "meta")


def _joined(size: int, values: Sequence[Any]) -> Any:
    """One argument of several calls, as that of a batch.

    Raises:
        ValueError: it differs, and is no tensor with one part for each picture.
    """
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim and len(first) == size:
            return torch.cat(list(values))
        if all(torch.equal(first, other) for other in values[1:]):
            return first
    elif all(first == other for other in values[1:]):
        return first
    raise ValueError("arguments differ from tile to tile")


def _split(result: Tensor, count: int, size: int) -> Sequence[Tensor]:
    if not result.ndim or len(result) != count * size:
        raise ValueError("the network does not give one result for each picture")
    return result.split(size)
