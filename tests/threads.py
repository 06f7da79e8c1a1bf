"""Ranks as threads of one process: the `Comm` that quick tests use. The real one is tested with gloo processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, Queue
from typing import Any

import torch

from halovae.comm import Message, Traffic


class PeerFailed(Exception):
    """Sent by a rank that raised, so that the others don't wait for it."""


def _received(queue: Queue[Any]) -> Any:
    value = queue.get(timeout=20)
    if isinstance(value, PeerFailed):
        raise value
    return value


class ThreadPending:
    def __init__(self, receives: list[tuple[Queue[Any], torch.Tensor]], earlier: ThreadPending | None) -> None:
        self._receives, self._earlier = receives, earlier

    def wait(self) -> None:
        # In the order they were posted, since a queue has one end.
        earlier, self._earlier = self._earlier, None
        if earlier:
            earlier.wait()
        receives, self._receives = self._receives, []
        for queue, buffer in receives:
            tensor = _received(queue)
            assert tensor.shape == buffer.shape, f"expected {buffer.shape}, got {tensor.shape}"
            assert tensor.dtype == buffer.dtype
            buffer.copy_(tensor)


class ThreadComm:
    def __init__(self, rank: int, size: int, queues: dict[tuple[int, int], Queue[Any]]) -> None:
        self.rank, self.size, self._queues = rank, size, queues
        self.traffic = Traffic()
        self._last: ThreadPending | None = None

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.post(sends, receives).wait()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> ThreadPending:
        for peer, tensor in sends:
            assert tensor.is_contiguous()
            self._queues[self.rank, peer].put(tensor.clone())
            self.traffic.messages += 1
            self.traffic.bytes += tensor.nbytes
        self._last = ThreadPending([(self._queues[peer, self.rank], buffer) for peer, buffer in receives], self._last)
        return self._last

    def all_gather_object(self, value: Any) -> list[Any]:
        if self._last:
            self._last.wait()
        for peer in range(self.size):
            self._queues[self.rank, peer].put(value)
        return [_received(self._queues[peer, self.rank]) for peer in range(self.size)]

    def check(self) -> None:
        return


def run_threads(size: int, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """`work(comm)` on `size` ranks; their results in rank order. The first rank's exception is raised."""
    queues: dict[tuple[int, int], Queue[Any]] = {(a, b): Queue() for a in range(size) for b in range(size)}
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def body(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = work(ThreadComm(rank, size, queues))
        except BaseException as error:
            errors[rank] = error
            for peer in range(size):
                queues[rank, peer].put(PeerFailed())

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, (PeerFailed, Empty))):
        raise error
    return results
