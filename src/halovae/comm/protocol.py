"""What the layers above need of a group of ranks, and the group of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from halovae.base.timeline import note

Message = tuple[int, Tensor]
Start = tuple[int, int]
"""Names what ranks are to begin together; the same on all of them."""


@dataclass
class Traffic:
    """What this rank sent and how long it waited, summed since the last reset."""

    messages: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0

    def waited_since(self, start: float) -> None:
        """Count the seconds since `start`, a time of `time.perf_counter`, as spent in an exchange."""
        self.wait_seconds += time.perf_counter() - start
        note("wait", start)


class Pending(Protocol):
    """Messages under way. The tensors posted belong to them until `wait` returns."""

    def wait(self) -> None:
        """Return when everything is sent and every buffer is filled. A second call does nothing.

        Raises:
            RankFailedError: another rank has failed, so that nothing more will come.
        """
        ...


class Nothing:
    """The pending messages of an exchange that has none."""

    def wait(self) -> None:
        return


class GraphLane(Protocol):
    """Messages that are part of a device's graphs. After a failure its graphs are void."""

    def capturing(self) -> AbstractContextManager[None]:
        """Around the capture of graphs."""
        ...

    def hold(self, graph: Any) -> None:
        """Take note of a graph that has messages in it, so that a failure can make it void."""
        ...

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Sequence[Any]:
        """Put an exchange into the graph that is being captured; each `wait` of what this gives puts that there."""
        ...

    def replay(self, graph: Any) -> None:
        """Launch a graph, or raise RuntimeError where a failure has made it void."""
        ...


class Forgone(Exception):
    """A rank will not begin what this one has begun: it is not waited for. Says which, and why."""

    def __init__(self, rank: int, why: Any) -> None:
        super().__init__(rank, why)
        self.rank, self.why = rank, why


class Comm:
    """What the layers above need of a group of ranks. What stands here is enough for a group of one.

    Attributes:
        rank: index of this process in the group.
        size: number of ranks in the group.
        traffic: counters of this rank, replaced by who counts anew.
        era: how many calls of the group have failed; graphs with messages in them are void in the next.
        starting: what this rank is about to begin, where others may `forgo` that.
    """

    rank: int = 0
    size: int = 1
    era: int = 0
    starting: Start | None = None

    def __init__(self) -> None:
        self.traffic = Traffic()

    def set_patience(self, seconds: float) -> None:
        """After how long without a sign of life a rank counts as stopped."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send contiguous tensors to peers and fill contiguous buffers from peers; returns when all are done.

        Messages between one pair of ranks arrive in the order of the lists.

        Raises:
            RankFailedError: another rank has failed.
        """
        self.post(sends, receives).wait()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Begin an exchange and return at once.

        Exchanges between ranks pair up in the order they are posted, so all ranks post theirs in the same order.
        """
        if sends or receives:
            raise RuntimeError("a group of one has no peers")
        return Nothing()

    def lane_of_graphs(self, device: torch.device) -> GraphLane | None:
        """What puts messages between such devices into their graphs; None: only the host can post them."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, in rank order.

        Raises:
            RankFailedError: another rank has failed, or has left the group.
            Forgone: what is `starting` will not begin on another rank. It is as if this had not been called.
        """
        return [value]

    def forgo(self, start: Start, why: Any) -> None:
        """Tell the others that this rank will not begin something. Waits for nobody; a finalizer may call it, at any
        time. What one rank has forgone, each other one begins or forgoes, once.

        Args:
            why: what the others get of it; picklable.
        """

    def begin(self) -> None:
        """Begin a call, which all ranks make; after a failed one this connects the ranks anew."""

    def check(self) -> None:
        """Cheap enough for every operator.

        Raises:
            RankFailedError: another rank has failed in this call.
        """

    def synchronize(self) -> None:
        """Wait for the device, which may wait for messages; after too long a time for that this rank fails."""

    def finish(self) -> None:
        """End a call: returns when every rank has come to its end."""

    def fail(self, error: BaseException) -> None:
        """End a call with an error: all ranks leave it at once, and those that wait are woken."""

    def close(self) -> None:
        """Leave the group; the last thing that is done with it."""


class SoloComm(Comm):
    """A group of one: nothing to send, and nobody to fail."""


def all_gather(comm: Comm, value: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The tensors of `ranks`, in that order; all have the shape and dtype of `value`. Called by each of `ranks`."""
    # Said in words: kernels that run beneath keep a mere contiguous() channels last.
    value = value.contiguous(memory_format=torch.contiguous_format)
    gathered = [value if rank == comm.rank else torch.empty_like(value) for rank in ranks]
    peers = [rank for rank in ranks if rank != comm.rank]
    received = [(rank, buffer) for rank, buffer in zip(ranks, gathered, strict=True) if rank != comm.rank]
    comm.exchange([(rank, value) for rank in peers], received)
    return gathered
