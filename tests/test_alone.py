"""Shards, or each rank alone: how that is decided, that all ranks go the same way, and that results stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from families import EXACT
from pictures import error, kl, latents, pixels
from ranks import Ranks
from recorder import recorder
from torch import Tensor, nn

import halovae
from halovae.api import caller
from halovae.base import verdicts
from halovae.base.errors import InputError, RankFailedError
from halovae.calls import contest
from halovae.calls.contest import needs_more
from halovae.comm import default_device
from halovae.exact.run import GroupRun

FORCED = halovae.Options(alone=True)


def last(handle: halovae.Handle) -> Any:
    assert handle.last is not None
    return handle.last


def found_alone(handle: halovae.Handle, call: Callable[[], Any], times: int = 4) -> list[bool]:
    """Which of some calls were made alone."""
    found = list[bool]()
    for _ in range(times):
        call()
        found.append(bool(last(handle).alone))
    return found


# ---- the decision ----------------------------------------------------------------------------------------------------


def test_rounds_go_on_while_they_may_tell_more() -> None:
    near = [(0.016, 0.02), (0.017, 0.02), (0.016, 0.03)]
    assert [needs_more(near[:count]) for count in range(4)] == [True, True, True, False]
    # What is slow once, for whatever other work there is, is not slow.
    assert needs_more([(0.016, 0.02), (0.9, 0.02)])
    for clear in ([(0.016, 0.04), (0.09, 0.03)], [(0.05, 0.02), (0.04, 0.02)]):
        assert not needs_more(clear)


def test_alone_is_yes_or_no_or_auto() -> None:
    with pytest.raises(InputError, match="alone is 1: give True, False or 'auto'"):
        halovae.Options(alone=1)  # pyright: ignore[reportArgumentType]


# ---- the calls -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def both_halves(rank: int, mode: str) -> None:
    """The encoded picture goes to all ranks, the decoded one to the first."""
    vae, x, z = kl(), pixels(), latents()
    expected = {"encode": vae.encode(x)[0].parameters, "decode": vae.decode(z)[0]}
    gather: Any = {"encode": "all", "decode": "first"}
    with halovae.parallelize(vae, mode=mode, gather=gather, options=FORCED) as handle:
        for half in ("encode", "decode"):
            for number in range(1, 6):
                found = vae.encode(x)[0].parameters if half == "encode" else vae.decode(z)[0]
                told = last(handle)
                assert ("trial" in told.phases) == (number == 3)
                assert bool(told.alone) == (number > 3) == (told.shape == (1, 1)) == (told.messages == 0)
                if half == "encode" or rank == 0:
                    assert error(found, expected[half]) <= EXACT
                elif told.alone:
                    assert (found.numel(), told.extents) == (0, {"height": (0, 0), "width": (0, 0)})
            assert "ms, on shards" in told.alone
            assert f"on 1 x 1 shard (each rank alone: {told.alone})" in str(told)
            assert (half, told.choice.split(":")[0]) == (half, "exact" if mode == "auto" else "")
        # Another size is another kind of call; streams and inputs of each rank go their own ways.
        assert error(vae.encode(pixels(48, 48))[0].parameters, kl().encode(pixels(48, 48))[0].parameters) <= EXACT
        assert not last(handle).alone
        [piece] = handle.decode_stream(z)
        assert rank or error(piece, expected["decode"]) <= EXACT
        assert not last(handle).alone
        assert error(handle.each("decode", z + rank)[0], kl().decode(z + rank)[0]) <= EXACT


@pytest.mark.parametrize("mode", ["exact", "auto"])
def test_calls_alone_give_what_calls_on_shards_give(two_ranks: Ranks, mode: str) -> None:
    two_ranks.run(both_halves, mode)


class Odd(nn.Module):
    """A decoder that does something besides, or nothing."""

    def __init__(self, does: str = "") -> None:
        super().__init__()
        self.layer, self.does = nn.Conv2d(4, 3, 3, padding=1).double(), does
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.seen: list[Tensor] = []

    def decode(self, z: Tensor) -> Any:
        if self.does == "draws":
            z = z + torch.randn(z.shape, dtype=z.dtype)
        if self.does == "writes":
            z.mul_(1.5)
        found = self.layer(z)
        if self.does == "keeps":
            self.seen = [found]
        return found


@torch.no_grad()
def never(rank: int) -> None:
    """Where it can't be, where it was not asked for, and where bits, hooks or the time of a call forbid a trial."""

    def is_tried(vae: Any, rare: dict[str, Any], **named: Any) -> bool:
        with halovae.parallelize(vae, verify=False, options=halovae.Options(**rare), **named) as handle:
            assert not any(found_alone(handle, lambda: vae.decode(latents()), 2))
            assert found_alone(handle, lambda: vae.decode(latents()), 1) == [False]
            was_tried = "trial" in last(handle).phases
            assert found_alone(handle, lambda: vae.decode(latents()), 1) == [False]
        return was_tried

    vae, forced = Odd(), {"alone": True}
    torch.manual_seed(rank)
    for does in ("draws", "writes", "keeps"):
        assert is_tried(Odd(does), forced)
    for named in ({"axis": "height"}, {"size": 1}, {"gather": "shard"}):
        assert not is_tried(vae, forced, **named)
    assert not is_tried(vae, {"alone": False})
    assert not is_tried(vae, forced | {"same_bits": True})
    with patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
        is_tried(vae, forced)
    for limit in ("_SMALL", "FULL_CALL"):
        with patch.object(contest, limit, 0), patch.object(contest, "_GAIN", 1e9):
            is_tried(vae, {})
    with patch.object(contest, "_GAIN", 1e9), patch.object(contest, "_SMALL", 1e9):
        seen = list[int]()
        if rank:
            vae.layer.register_forward_hook(lambda *_: seen.append(1))
        is_tried(vae, {})
        assert len(seen) == 4 * rank


def test_where_calls_stay_on_shards(two_ranks: Ranks) -> None:
    two_ranks.run(never)


def replayed(rank: int) -> None:
    """A device that records: the trial ends with a recording of the way that is kept, and frees the other one."""
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    gain, small = patch.object(contest, "_GAIN", 1e9), patch.object(contest, "_SMALL", 1e9)
    options, found = halovae.Options(graphs=True), list[tuple[bool, bool, str]]()
    with recorder(), gain, small, torch.no_grad(), halovae.parallelize(vae, verify=False, options=options) as handle:
        other = torch.cat([z, z], -1)
        with patch.object(contest, "_GAIN", 0.0):
            assert not any(found_alone(handle, lambda: vae.decode(other)))
        assert last(handle).replayed
        for _ in range(5):
            assert error(vae.decode(z)[0], expected) <= EXACT
            found.append((bool(last(handle).alone), last(handle).replayed, last(handle).recording))
        vae.decode(other)
        assert last(handle).replayed  # What another kind of call goes on with is not freed.
    assert [kind[:2] for kind in found] == [
        (False, False),
        (False, False),
        (False, True),
        (True, True),
        (True, True),
    ], found
    assert "exchanges" in found[2][2]
    assert found[3][2] == found[4][2] == "1 graph"


@pytest.mark.skipif(default_device().type != "cpu", reason="the device that stands in for one is a CPU")
def test_calls_alone_are_replayed(two_ranks: Ranks) -> None:
    two_ranks.run(replayed)


# ---- failures --------------------------------------------------------------------------------------------------------


class Fault:
    """Of a decoder: the call of that number raises."""

    def __init__(self, vae: Any, number: int, error: Exception) -> None:
        self._left, self._error = number, error
        self._hook = vae.decoder.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._hook.remove()
            raise self._error


@torch.no_grad()
def failing(rank: int, mode: str) -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]

    def right() -> None:
        assert error(vae.decode(z)[0], expected) <= EXACT

    bad, short = ValueError("bad weather"), RuntimeError("can't allocate memory")
    with halovae.parallelize(vae, mode=mode, verify=False, options=FORCED) as handle:
        assert found_alone(handle, right) == [False, False, False, True]
        # A rank that raises alone ends the call on all, and the next one goes on.
        if rank:
            Fault(vae, 1, bad)
        with pytest.raises(ValueError if rank else RankFailedError, match="bad weather"):
            right()
        assert found_alone(handle, right, 1) == [True]
        # One that fails before it knows what kind of call this is asks the others no less than they ask it.
        fails = patch.object(caller, "PeakMemory", Mock(side_effect=bad)) if rank else nullcontext()
        with fails, pytest.raises(ValueError if rank else RankFailedError, match="bad weather"):
            vae.decode(torch.cat([z, z], -1))
        assert found_alone(handle, right)[-1]  # Where one of them has not seen the call, all find out anew.
        # One that has too little memory alone lets all go back to shards, at once and for good.
        if rank:
            Fault(vae, 1, short)
        assert found_alone(handle, right) == [False] * 4

    # Nor does it where the other rank has begun with the trial by then.
    gather, results = GroupRun.gather, iter((1, 2, short))

    def run_out(work: GroupRun) -> Any:
        found = gather(work)
        if rank and isinstance(problem := next(results, 0), Exception):
            raise problem
        return found

    short_of_memory = patch.object(GroupRun, "gather", run_out)
    with halovae.parallelize(vae, mode=mode, verify=False, options=FORCED) as handle, short_of_memory:
        assert found_alone(handle, right) == [False] * 4

    # Alone in the trial, any failure is an answer. Too little memory on shards in the trial costs no result either.
    for number, problem in ((2, bad), (3, short)):
        with halovae.parallelize(vae, mode=mode, verify=False, options=FORCED) as handle:
            assert found_alone(handle, right, 2) == [False, False]
            if rank:
                Fault(vae, number, problem)
            assert found_alone(handle, right, 2) == [False, False]


@pytest.mark.parametrize("mode", ["exact", "auto"])
def test_failures_alone_end_alike_on_all_ranks(two_ranks: Ranks, mode: str) -> None:
    two_ranks.run(failing, mode)


# ---- on disk ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def asked(rank: int, folder: str, gain: float, times: int) -> tuple[list[bool], str, bool]:
    """Which calls of a new handle were made alone, the last one's words, and whether there was a trial."""
    vae, z, expected = kl(), latents(), kl().decode(latents())[0]
    switch = {verdicts.SWITCH: "on", "XDG_CACHE_HOME": folder}
    tried = patch.object(contest.Contest, "_compare", autospec=True, side_effect=contest.Contest._compare)
    small = patch.object(contest, "_SMALL", 1e9)
    with patch.dict(os.environ, switch), patch.object(contest, "_GAIN", gain), small, tried as trial:
        with halovae.parallelize(vae) as handle:
            found = found_alone(handle, lambda: None if error(vae.decode(z)[0], expected) <= EXACT else 1 / 0, times)
        return found, last(handle).alone, trial.called


def test_another_process_does_not_ask_again(two_ranks: Ranks, tmp_path: Path) -> None:
    first = two_ranks.run(asked, str(tmp_path), 1e9, 4)
    assert first[0] == first[1]
    found, words, was_tried = first[0]
    assert (found, was_tried) == ([False, False, False, True], True)
    assert two_ranks.run(asked, str(tmp_path), 1e9, 4) == [([True] * 4, words, False)] * 2
    # The times are kept, not what they meant.
    assert two_ranks.run(asked, str(tmp_path), 0.0, 4) == [([False] * 4, "", False)] * 2
