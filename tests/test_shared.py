"""Shared memory between ranks of one host, with threads for ranks. Processes: `test_parallel`."""

from __future__ import annotations

import gc
import os
import platform
import socket
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_link import with_links
from torch import Tensor

from halovae.comm.control import Link
from halovae.comm.shared_memory import SMALL, SharedLane, can_share

SIZES = (1, 0, 7, 1000, 64 << 10, (64 << 10) + 1, SMALL)


def with_lanes(size: int, work: Callable[[SharedLane, int], Any]) -> list[Any]:
    """`work(lane, rank)` on `size` ranks, which all have left it when the first lane ends."""
    done = threading.Barrier(size, timeout=20)

    def body(link: Link, rank: int) -> Any:
        lane = SharedLane(link, rank, [peer for peer in range(size) if peer != rank])
        try:
            return work(lane, rank)
        finally:
            done.wait()

    return with_links(size, body)


def message(sender: int, receiver: int, number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + 10 * sender + receiver)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)


def buffers(size: int) -> Tensor:
    return torch.full((size,), 77, dtype=torch.uint8)


@pytest.mark.parametrize("early", [True, False], ids=["expected first", "sent first"])
def test_messages_arrive_whole_and_in_order(early: bool) -> None:
    """Of every size, between all of three ranks, and in whichever order they are waited for."""

    def work(lane: SharedLane, rank: int) -> None:
        peers = [peer for peer in range(3) if peer != rank]
        sends = [(p, message(rank, p, number, size)) for p in peers for number, size in enumerate(SIZES)]
        receives = [(p, buffers(size)) for p in peers for size in SIZES]
        if early:
            arrivals = lane.post(sends, receives)
        else:
            lane.post(sends, [])
            arrivals = lane.post([], receives)
        for arrival in reversed(arrivals):
            arrival.wait()
        expected = [message(p, rank, number, size) for p in peers for number, size in enumerate(SIZES)]
        assert all(map(torch.equal, [buffer for _, buffer in receives], expected))

    with_lanes(3, work)


def test_more_messages_than_the_kernel_keeps() -> None:
    """Both ranks send thousands before either waits: neither may wait for the other to read."""

    def work(lane: SharedLane, rank: int) -> bool:
        arrivals, found = [], []
        for number in range(2000):
            found.append(buffers(8))
            lane.post([(1 - rank, message(rank, 1 - rank, number, 8))], [])
        for buffer in found:
            arrivals += lane.post([], [(1 - rank, buffer)])
        for arrival in arrivals:
            arrival.wait()
        return all(torch.equal(buffer, message(1 - rank, rank, number, 8)) for number, buffer in enumerate(found))

    assert with_lanes(2, work) == [True, True]


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred exchanges take as much of it as the first ones: three segments at the most for each of two ranks.

    And none of them holds a descriptor.
    """
    made: list[int] = []
    create = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name: made.append(create(name)) or made[-1])

    def work(lane: SharedLane, rank: int) -> None:
        for number in range(100):
            buffer = buffers(100_000)
            (arrival,) = lane.post([(1 - rank, message(rank, 1 - rank, number, 100_000))], [(1 - rank, buffer)])
            arrival.wait()
            assert torch.equal(buffer, message(1 - rank, rank, number, 100_000))

    before = len(os.listdir("/proc/self/fd"))
    with_lanes(2, work)
    assert 2 <= len(made) <= 6
    assert len(os.listdir("/proc/self/fd")) <= before


def test_messages_of_inference_mode_and_outside_of_it() -> None:
    """Memory made in one of them is written in the other."""

    def work(lane: SharedLane, rank: int) -> None:
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                buffer = buffers(10)
                (arrival,) = lane.post([(1 - rank, message(rank, 1 - rank, 0, 10))], [(1 - rank, buffer)])
                arrival.wait()
                assert torch.equal(buffer, message(1 - rank, rank, 0, 10))

    with_lanes(2, work)


def test_who_waits_is_woken_by_an_end() -> None:
    """Of its own lane or of the other one; whoever posts after that is told as well."""

    def work(lane: SharedLane, rank: int) -> None:
        if rank == 0:
            threading.Timer(0.3, lane.abort).start()
        (arrival,) = lane.post([], [(1 - rank, buffers(10))])
        with pytest.raises(RuntimeError, match="has ended"):
            arrival.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            lane.post([(1 - rank, buffers(10))], [])

    with_lanes(2, work)


def test_a_message_to_a_rank_that_has_ended_leaves_no_file_open() -> None:
    """Its segment's descriptor was to travel with it."""

    def work(lane: SharedLane, rank: int) -> bool:
        lane.abort()
        with pytest.raises(RuntimeError, match="has ended"):
            lane.post([(1 - rank, message(rank, 1 - rank, 0, 1000))], [])
        return True

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    assert all(with_lanes(2, work))
    assert open_files() == before


def test_a_rank_that_sends_nothing_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.comm.shared_memory.ABSENCE", 0.2)

    def work(lane: SharedLane, rank: int) -> None:
        (arrival,) = lane.post([], [(1 - rank, buffers(10))])
        with pytest.raises(RuntimeError, match="another rank has sent nothing for 0 s"):
            arrival.wait()

    with_lanes(2, work)


@pytest.mark.parametrize("forbidden", ["memfd_create", "socket"])
def test_a_system_without_it_goes_without_it(forbidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_share() == (platform.machine() in ("x86_64", "AMD64"))

    def refuse(*args: Any) -> Any:
        raise PermissionError("a sandbox forbids it")

    monkeypatch.setattr(os if forbidden == "memfd_create" else socket, forbidden, refuse)
    assert not can_share()
    SharedLane(MagicMock(), 0, []).post([], [])  # Nobody to share with: it opens nothing.
