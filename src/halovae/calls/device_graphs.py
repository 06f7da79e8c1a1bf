"""What a call asks of an accelerator and of the other ranks, kept to be done again without the Python in between.

Kernels go into graphs ("CUDA graphs"). Where the backend can, messages do too, and one launch makes the whole call.
Else there is a graph for each stretch between two messages, which are posted as in any call. Either way a rank that
fails is noticed as ever: news of it comes by the link, and ends what the device waits for.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from halovae.base.forks import free_in_children
from halovae.base.functions import outside_modes
from halovae.base.private_torch import borrow_storage, release_pool
from halovae.comm import Comm, GraphLane, Message, Pending, SoloComm, Traffic
from halovae.comm.protocol import Nothing
from halovae.exact.layout import layout_of, mark

RECORDERS = ("cuda", "npu")
"""Kinds of devices whose graphs have the form that is used here."""


def can_record(device: torch.device) -> bool:
    """Whether there are graphs for such a device."""
    return device.type in RECORDERS and hasattr(torch.get_device_module(device), _graph_of(device))


Take = Callable[[Tensor], None]
"""Gets a part of a call's result, on shards, before the rest is there."""


def to_nobody(part: Tensor) -> None:
    """Takes the parts of a call that leaves none."""


_one_at_a_time = free_in_children(threading.Lock())
"""Handles in other threads record on the same stream."""


@functools.cache
def _stream(device: torch.device) -> Any:
    """To record on; one, because libraries keep a workspace for each stream that they have seen."""
    return torch.get_device_module(device).Stream(device)


def _graph_of(device: torch.device) -> str:
    return f"{device.type.upper()}Graph"


class Outlet:
    """Where a call leaves the parts of its result that are there before the rest.

    Args:
        take: gets them.
    """

    def __init__(self, take: Take = to_nobody) -> None:
        self.take = take

    def __call__(self, part: Tensor) -> None:
        self.take(part)

    @contextmanager
    def to(self, take: Take) -> Iterator[None]:
        """Within it, another one gets them."""
        before, self.take = self.take, take
        try:
            yield
        finally:
            self.take = before


class Tape(SoloComm):
    """Stands for a group while a call is recorded: nothing runs and nothing is sent before `replay`.

    Args:
        comm: the group.
        device: of this rank.
        lane: puts messages into the graphs; None: they are posted by the host, between two graphs.

    Attributes:
        graphs: how many there are.
        exchanges: how many are in a replay.
        is_whole: whether these are in the graphs.
        traffic: of the graph that is being captured.
    """

    def __init__(self, comm: Comm, device: torch.device, lane: GraphLane | None = None) -> None:
        super().__init__()
        self.rank, self.size = comm.rank, comm.size
        self.graphs, self.exchanges, self.is_whole = 0, 0, lane is not None
        self._comm, self._device, self._lane = comm, device, lane
        self._module: Any = torch.get_device_module(device)
        self._pool = self._module.graph_pool_handle()
        self._graph: Any = None
        self._steps: list[Callable[[], object]] = []
        self._recorded: list[_Recorded] = []
        self._under_way: dict[int, Pending] = {}
        self._outlet = Outlet()
        self._done: Any = self._module.Event()

    # ---- recording ---------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, the device is only told what it will have to do.

        Raises:
            RuntimeError: something needs an answer of the device, or can't be put off for another reason.
        """
        self._module.synchronize(self._device)
        self._module.empty_cache()  # The graphs have memory of their own.
        alone = self._lane.capturing() if self._lane else nullcontext()
        with _one_at_a_time, warnings.catch_warnings(), self._module.stream(_stream(self._device)), alone:
            # There is nothing between some messages.
            warnings.filterwarnings("ignore", message=".*Graph is empty")
            try:
                self._begin()
                yield
                self._wait_for_all()
                self._end()
            except BaseException:
                self._abandon()
                raise
            finally:
                self._recorded.clear()
        self._module.synchronize(self._device)

    def _begin(self) -> None:
        self.traffic = Traffic()
        self._graph = getattr(self._module, _graph_of(self._device))()
        # Other threads may go on asking the device: those of backends watch their messages.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        self._graph.capture_end()
        self.graphs += 1
        lane = self._lane
        if lane:
            lane.hold(self._graph)
        launch = functools.partial(_launch, self._comm, lane, self._graph, self.traffic) if lane else self._graph.replay
        self._steps.append(launch)

    def _abandon(self) -> None:
        """Leave the stream and the memory in order after an error."""
        with suppress(RuntimeError):  # Of the error itself.
            self._graph.capture_end()
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # A capture that ended well has done it.
                release_pool(self._device, self._pool)
        with suppress(RuntimeError):  # An empty one that ends well: the generator of the device takes note of the end.
            self._graph = getattr(self._module, _graph_of(self._device))()
            self._graph.capture_begin(capture_error_mode="thread_local")
            self._graph.capture_end()

    def _wait_for_all(self) -> None:
        for posted in self._recorded:
            posted.wait()

    def _between(self, step: Callable[[], object]) -> None:
        self._end()
        self._steps.append(step)
        self._begin()

    @outside_modes
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        if self._lane or not (sends or receives):
            self.post(sends, receives).wait()
            return
        self.exchanges += 1
        # No step refers to the tape: a recording that is dropped is to give its memory back at once.
        self._between(functools.partial(self._comm.exchange, _places(sends), _places(receives)))

    @outside_modes
    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return Nothing()
        self.exchanges += 1
        wait = self._posted_in_graph(sends, receives) if self._lane else self._posted_by_host(sends, receives)
        self._recorded.append(_Recorded(wait, [*sends, *receives]))
        return self._recorded[-1]

    def _posted_in_graph(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], object]:
        assert self._lane is not None, "else the host posts"
        if any(tensor.device.type != self._device.type for _, tensor in (*sends, *receives)):
            raise RuntimeError("messages between other devices are not part of a graph")
        works = self._lane.post(sends, receives)
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for _, tensor in sends)
        return lambda: [work.wait() for work in works]

    def _posted_by_host(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], object]:
        outgoing, incoming, number = _places(sends), _places(receives), len(self._recorded)
        comm, under_way = self._comm, self._under_way

        def again() -> None:
            under_way[number] = comm.post(outgoing, incoming)

        self._between(again)
        return lambda: self._between(lambda: under_way.pop(number).wait())

    @outside_modes
    def part(self, tensor: Tensor) -> None:
        """A part of the result that is there before the rest: who asks for a replay gets it then, in new memory."""
        place, layout, outlet = _place_of(tensor), layout_of(tensor), self._outlet

        def hand_out() -> None:
            outlet(mark(place.clone(), layout))

        if self._lane:  # A graph ends when all that is in it has been waited for.
            self._wait_for_all()
        self._between(hand_out)

    def all_gather_object(self, value: Any) -> list[Any]:
        raise RuntimeError("what ranks tell each other in a call can't be recorded")

    def check(self) -> None:
        self._comm.check()

    # ---- afterwards --------------------------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it, the memory of the recording is the caller's: replays on several streams follow each other."""
        stream = self._module.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def replay(self, take: Take = to_nobody) -> None:
        """Do again what was recorded, in the same memory.

        Args:
            take: gets the parts of the result that are there before the rest. What it raises ends the replay.

        Raises:
            RankFailedError: another rank has failed, now or since the recording.
        """
        try:
            with self._outlet.to(take):
                for step in self._steps:
                    step()
        finally:
            while self._under_way:  # Of a replay that was ended.
                self._under_way.popitem()[1].wait()


def _launch(comm: Comm, lane: GraphLane, graph: Any, traffic: Traffic) -> None:
    try:
        lane.replay(graph)
    except RuntimeError:
        comm.check()  # A failure has made it void.
        raise
    comm.traffic.messages += traffic.messages
    comm.traffic.bytes += traffic.bytes


class _Recorded:
    """Messages on a tape. Holds on to their memory until they are waited for: nothing else is to be put there."""

    def __init__(self, wait: Callable[[], object], messages: Sequence[Message]) -> None:
        self._wait = wait
        self._messages: Sequence[Message] | None = messages

    @outside_modes
    def wait(self) -> None:
        if self._messages is not None:
            self._messages = None
            self._wait()


def _places(messages: Sequence[Message]) -> list[Message]:
    return [(peer, _place_of(tensor)) for peer, tensor in messages]


def _place_of(tensor: Tensor) -> Tensor:
    """The same memory in a tensor that does not own it: when the call has done with it, it is free for others."""
    storage = tensor.untyped_storage()
    borrowed = borrow_storage(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(borrowed, tensor.storage_offset(), tensor.shape, tensor.stride())
