"""The link between ranks, with threads for ranks: real sockets, no processes. `test_agreement` has those."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halovae.base.errors import RankFailedError
from halovae.comm import control, handshake
from halovae.comm.control import Link


def on_threads(size: int, work: Callable[[int, handshake.Share], Any]) -> list[Any]:
    """`work(rank, share)` on `size` threads; their results in rank order."""
    table: dict[int, list[Any]] = {}
    meeting, results = threading.Barrier(size, timeout=20), [None] * size

    def body(rank: int) -> None:
        rounds = 0

        def share(value: Any) -> list[Any]:
            nonlocal rounds
            table.setdefault(rounds, [None] * size)[rank] = value
            meeting.wait()
            rounds += 1
            return table[rounds - 1]

        results[rank] = work(rank, share)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def with_links(size: int, work: Callable[[Link, int], Any]) -> list[Any]:
    def body(rank: int, share: handshake.Share) -> Any:
        made = Link(rank, size, share, lambda: None)
        try:
            return work(made, rank)
        finally:
            made.close()

    return on_threads(size, body)


def test_values_come_in_rank_order() -> None:
    found = with_links(4, lambda made, rank: [made.gather((rank, turn)) for turn in range(50)])
    assert found == [[[(rank, turn) for rank in range(4)] for turn in range(50)]] * 4


@pytest.mark.parametrize("bad", [0, 2])
def test_a_failure_wakes_who_waits_and_the_next_era_is_clean(bad: int) -> None:
    def work(made: Link, rank: int) -> tuple[int, str, list[int]]:
        for _ in range(5):
            if rank == bad:
                time.sleep(0.05)
                made.fail("the weather", "a traceback")
                blamed, message = rank, "the weather"
            else:
                with pytest.raises(RankFailedError) as caught:
                    made.gather(rank)
                blamed, message = caught.value.rank, caught.value.message
            made.next_era()
        return blamed, message, made.gather(rank)

    assert with_links(3, work) == [(bad, "the weather", [0, 1, 2])] * 3


def test_who_has_left_is_named() -> None:
    both_know = threading.Barrier(2, timeout=20)

    def work(made: Link, rank: int) -> int:
        if rank == 1:
            return 1
        with pytest.raises(RankFailedError, match="has left the group") as caught:
            made.gather(rank)
        both_know.wait()  # The first of them to leave would be named to the other.
        return caught.value.rank

    assert with_links(3, work) == [1, 1, 1]


@pytest.mark.parametrize("missing", [0, 2])
def test_who_never_comes_is_named(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, the one that comes too late too; then all go on."""
    monkeypatch.setattr(control, "ABSENCE", 1.0)
    over = threading.Barrier(3, timeout=20)

    def work(made: Link, rank: int) -> tuple[int, str, list[int]]:
        if rank == missing:
            over.wait()
        with pytest.raises(RankFailedError) as caught:
            made.gather(rank)
        if rank != missing:
            over.wait()
        made.next_era()
        return caught.value.rank, caught.value.message, made.gather(rank)

    said = "it has not come to what the others have waited for 1 s"
    assert with_links(3, work) == [(missing, said, [0, 1, 2])] * 3


def test_a_device_that_waits_for_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ABSENCE", 0.5)

    def work(made: Link, rank: int) -> tuple[int, str]:
        made.set_patience(2.0)
        if rank == 1:
            with made.limited():
                pass  # What is over in time is none.
            with made.limited():
                started = time.monotonic()
                while not made.troubled and time.monotonic() - started < 10:
                    time.sleep(0.01)
        with pytest.raises(RankFailedError) as caught:
            made.wait_for(lambda: False, lambda: None)
        return caught.value.rank, caught.value.message

    assert with_links(2, work) == [(1, "its device has waited 0 s for messages of other ranks")] * 2


def test_a_shorter_patience_is_kept_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who is waiting by the longer one would give no sign of life in time, and be called stopped."""
    heard: list[Link] = []
    monkeypatch.setattr(Link, "_take_beat", lambda made: heard.append(made))

    def work(made: Link, rank: int) -> bool:
        made.set_patience(0.4)
        deadline = time.monotonic() + 3
        while made not in heard and time.monotonic() < deadline:
            time.sleep(0.01)
        return made in heard

    assert with_links(2, work) == [True, True]


def test_strangers_are_not_let_in() -> None:
    """Who finds the port but does not know the token is turned away, and the ranks connect all the same."""

    def work(rank: int, share: handshake.Share) -> bool:
        def watched(value: Any) -> list[Any]:
            said = share(value)
            if rank == 1 and isinstance(said[0], tuple) and len(said[0]) == 3 and isinstance(said[0][0], list):
                with socket.create_connection((said[0][0][0], said[0][1])) as stranger:
                    stranger.sendall(b"x" * 20)  # As long as a greeting.
                    assert stranger.recv(64) == b""
            return said

        peers = handshake.star(rank, 2, watched)
        for peer in peers.values():
            peer.close()
        return len(peers) == 1

    assert on_threads(2, work) == [True, True]


AFTER_A_FAILURE = """
import torch, torch.distributed as dist
from families import FAMILIES
import halovae

dist.init_process_group("gloo")
vae, latent = FAMILIES["kl"].build(), FAMILIES["kl"].latent(torch.float32)
halovae.parallelize(vae.requires_grad_())
try:
    vae.decode(latent)  # With gradients.
except halovae.InputError:
    print("caught")
"""


def test_a_process_may_end_right_after_a_failure() -> None:
    """What breaks the connections is waited for: Python would end it within the backend, and so abort."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AFTER_A_FAILURE], env=os.environ | given | {"RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [(rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    assert [(said, code) for (said, _), code in ends] == 2 * [("caught\n", 0)], ends
