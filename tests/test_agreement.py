"""One fails, all know: in time, by name, and the next call is right. With real gloo ranks that raise, die and stop."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import EXACT, FAMILIES
from pictures import error, kl, latents, pixels
from ranks import ENDED, Ranks

import halovae
from halovae.base.errors import InputError, RankFailedError
from halovae.comm import connect, control
from halovae.comm.agreement import one_call

SOON = 10.0


class Boom(Exception):
    """What no other code raises."""


def bomb(vae: Any, after: int, action: Any) -> Any:
    """A hook that acts when the network's submodules have been called `after` times."""
    count = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            action()

    handles = [module.register_forward_pre_hook(hook) for module in vae.modules()]
    return lambda: [handle.remove() for handle in handles]


def raise_boom() -> None:
    raise Boom("the weather is bad")


def raise_oom() -> None:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 80 GiB")


def fail_then_succeed(rank: int, size: int, mode: str) -> list[float]:
    """12 failed calls, of another rank, half and moment each, and after each a right one."""
    vae, x, z = kl(), pixels(96, 96, batch=1), latents(12, 12, batch=1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    vae.use_tiling = mode == "tile"
    expected = {"encode": vae.encode(x)[0].parameters, "decode": vae.decode(z)[0]}
    seconds: list[float] = []
    with halovae.parallelize(vae, mode=mode, verify=False, options=halovae.Options(alone=False)) as handle:
        vae.encode(x), vae.decode(z)  # The first ones try what the VAE takes: an error there is an answer.
        for number in range(12):
            half, picture = (("encode", x), ("decode", z))[number % 2]
            bad, action = number % size, raise_oom if number % 3 else raise_boom
            disarm = bomb(vae, 1 + 7 * number % 25, action) if rank == bad else lambda: None
            started = time.monotonic()
            with pytest.raises((Boom, torch.OutOfMemoryError) if rank == bad else RankFailedError) as caught:
                getattr(vae, half)(picture)
            seconds.append(time.monotonic() - started)
            disarm()
            if rank != bad:
                cause = ("Boom: the weather", "OutOfMemoryError: out of memory")[action is raise_oom]
                assert caught.value.rank == bad
                assert cause in str(caught.value)
                assert f"in {action.__name__}" in caught.value.details
            found = vae.encode(x)[0].parameters if half == "encode" else vae.decode(z)[0]
            assert error(found, expected[half]) <= EXACT
        assert handle.last is not None
    return seconds


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_a_failure_is_raised_on_all_and_the_next_call_is_right(three_ranks: Ranks, mode: str) -> None:
    assert max(max(each) for each in three_ranks.run(fail_then_succeed, 3, mode)) < SOON


def with_spares(rank: int) -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, size=2, verify=False):
        disarm = bomb(vae, 20, raise_boom) if rank == 1 else lambda: None
        with pytest.raises(Boom if rank == 1 else RankFailedError):
            vae.decode(z)
        disarm()
        assert error(vae.decode(z)[0], expected) <= EXACT


def test_spare_ranks_know_too(three_ranks: Ranks) -> None:
    three_ranks.run(with_spares)


def two_at_once(rank: int) -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, verify=False):
        disarm = bomb(vae, 1 + rank, raise_boom)
        with pytest.raises((Boom, RankFailedError)):
            vae.decode(z)
        disarm()
        assert error(vae.decode(z)[0], expected) <= EXACT


def test_several_fail_at_once(three_ranks: Ranks) -> None:
    three_ranks.run(two_at_once)


def caches(rank: int) -> None:
    family = FAMILIES["magvit"]
    vae, x = family.build().to(torch.float64), family.sample(torch.float64)
    expected = vae.encode(x)[0].parameters
    with halovae.parallelize(vae):
        vae.encode(x)
        disarm = bomb(vae, 60, raise_boom) if rank == 0 else lambda: None
        with pytest.raises(Boom if rank == 0 else RankFailedError):
            vae.encode(x)
        disarm()
        assert error(vae.encode(x)[0].parameters, expected) <= family.encode_tolerance


def test_what_a_broken_call_leaves_in_the_network_is_cleared(two_ranks: Ranks) -> None:
    two_ranks.run(caches)


def late(rank: int, missing: int) -> None:
    """The second time all have to connect anew, and the third time all come."""
    comm = connect()
    with patch.object(control, "ABSENCE", 1.0):
        for _ in range(2):
            if rank == missing:
                time.sleep(3)
            with pytest.raises(RankFailedError, match="it has not come") as caught, one_call(comm):
                comm.all_gather_object(None)
            assert caught.value.rank == missing
    with one_call(comm):
        assert comm.all_gather_object(rank) == [0, 1]
    comm.close()


@pytest.mark.parametrize("missing", [0, 1])
def test_who_never_makes_the_call_is_named(missing: int, two_ranks: Ranks) -> None:
    two_ranks.run(late, missing)


# ---- forked children ----------------------------------------------------------------------------------------------


def exit_code_of(child: Callable[[], None]) -> int:
    """Of a forked process that does so much and ends; a hang is an end by a signal."""
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        try:
            child()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


@contextlib.contextmanager
def held_by_a_thread(locks: Sequence[Any]) -> Iterator[None]:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    yield
    over.set()
    thread.join()


def forks(rank: int) -> None:
    """On one rank or the other, while the link's locks and the handle's are held by threads that no child has."""
    kept: dict[str, Any] = {}

    def collect() -> None:
        kept.clear()
        gc.collect()

    def use() -> None:
        with pytest.raises(InputError, match="this process was forked from rank"):
            kept["vae"].decode(z)
        with pytest.raises(InputError, match="this process was forked from a rank"):
            halovae.parallelize(kl())
        kept["handle"].restore()
        assert error(kept["vae"].decode(z)[0], expected) <= EXACT

    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    handle = halovae.parallelize(vae, verify=False)
    vae.decode(z)
    kept.update(vae=vae, handle=handle)
    gc.collect()  # What other tests have left, files of libav with threads of their own among it, is not judged here.
    locks = handle._lock, handle._comm._link._news, *handle._comm._link._sending.values()
    del vae, handle
    for child in (collect, atexit._run_exitfuncs, use):
        if rank == 1 - (child is use):
            with held_by_a_thread(locks):
                code = exit_code_of(child)
            assert code == 0, f"{child.__name__}: {code}"
        assert error(kept["vae"].decode(z)[0], expected) <= EXACT
    kept["handle"].restore()


def test_forked_children_own_nothing(two_ranks: Ranks) -> None:
    two_ranks.run(forks)


# ---- processes that end or stop --------------------------------------------------------------------------------------


@torch.no_grad()
def until_failure(rank: int, victim: int, action: str, patience: float) -> tuple[float, int, str]:
    """Call until a rank fails: seconds since the victim acted, which rank is blamed, and why."""
    vae = FAMILIES["kl"].build().to(torch.float64)
    z = latents()
    halovae.parallelize(vae, verify=False, options=halovae.Options(timeout=patience))
    vae.decode(z)
    if rank == victim:
        if action == "kill" and os.fork() == 0:  # a worker that outlives it
            time.sleep(SOON)
            os._exit(0)
        kind = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]
        bomb(vae, 20, lambda: os.kill(os.getpid(), kind))
    return failure_of(lambda: vae.decode(z))


def failure_of(call: Callable[[], Any]) -> tuple[float, int, str]:
    """Seconds, rank and message. Of two calls: who has heard all in the first finds out in the second."""
    started = time.monotonic()
    try:
        for _ in range(2):
            call()
    except RankFailedError as failure:
        return time.monotonic() - started, failure.rank, failure.message
    raise AssertionError("no failure")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_at_once(victim: int) -> None:
    ranks = Ranks(3)
    ranks.begin(until_failure, victim, "kill", 60.0)
    for rank in {0, 1, 2} - {victim}:
        ok, said = ranks.answer(rank)
        assert ok, said
        assert said[0] < SOON
        assert said[1:] == (victim, ENDED)
    ranks.kill()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_after_the_time_out(victim: int) -> None:
    ranks = Ranks(3)
    ranks.begin(until_failure, victim, "stop", 2.0)
    for rank in {0, 1, 2} - {victim}:
        ok, said = ranks.answer(rank)
        assert ok, said
        assert 1 < said[0] < SOON
        assert said[1] == victim
        assert said[2].startswith("no sign of life for 2 s")
    os.kill(ranks.pid(victim), signal.SIGCONT)
    ok, said = ranks.answer(victim)
    assert ok, said
    ranks.kill()


def large_message(rank: int, stopped: int) -> tuple[float, int, str]:
    """One rank is stopped while it waits; then the other one tells it more than the system keeps for it."""
    comm = connect()
    comm.set_patience(2.0)
    if rank == stopped:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -STOP {os.getpid()}"])
    else:
        time.sleep(1.5)
    return failure_of(lambda: comm.all_gather_object(bytes(0 if rank == stopped else 2**26)))


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_while_it_is_told_much_is_named(stopped: int) -> None:
    ranks = Ranks(2)
    ranks.begin(large_message, stopped)
    ok, said = ranks.answer(1 - stopped)
    assert ok, said
    assert said[0] < SOON
    assert said[1:] == (stopped, "it takes no messages: it is stopped, or its machine is")
    os.kill(ranks.pid(stopped), signal.SIGCONT)
    ok, said = ranks.answer(stopped)
    assert ok, said
    ranks.kill()
