"""What moves tensors between the ranks: process groups of our own, which a failure may break without harm to others.

A wait inside of a backend can't be called off from outside; breaking the group under it can. So each link has groups of
its own and makes new ones after a failure. The user's group is only used to find each other.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from halovae.base.forks import free_in_children, owned_here
from halovae.comm.control import ABSENCE, Link
from halovae.comm.protocol import Message

_TIMEOUT = timedelta(seconds=ABSENCE)
# What makes a backend of its own is not public.
_C10D: Any = dist.distributed_c10d
_NEVER_SENT = 1
"""A tag that no message has."""


class Notes(dist.Store):
    """The store by which the members of a process group find each other: on the link, so that a failure ends a wait.

    Args:
        prefix: of this group's notes.
    """

    def __init__(self, link: Link, prefix: str) -> None:
        super().__init__()
        self._link, self._prefix = link, prefix

    def set(self, key: str, value: Any) -> None:
        self._link.note(self._prefix + key, bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._link.noted(self._prefix + key) or b""

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._link.wait_for(lambda: self.check(keys))

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._link.noted(self._prefix + key) is not None for key in keys)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)


def store_of(group: dist.ProcessGroup) -> dist.Store:
    """The store that the members of a group share."""
    return _C10D._get_process_group_store(group)


class TensorLane:
    """Moves what is in one kind of memory, until it is broken.

    Attributes:
        has_graphs: whether messages may be part of the device's graphs.
    """

    has_graphs = False

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._capture, self._turn = (free_in_children(threading.Lock()) for _ in range(2))
        self._broken = False
        # A backend ends only after the graphs that hold messages of it: it would wait for them without an end.
        weakref.finalize(self, _reset, self._graphs)
        owned_here(self, lambda lane: lane._graphs.clear())

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        """Begin an exchange of contiguous tensors; while a graph is being captured, as a part of that."""
        # As bytes: no backend then needs to know the dtype.
        return self._post([(p, _raw(t)) for p, t in sends], [(p, _raw(t)) for p, t in receives])

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        raise NotImplementedError

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Around the capture of graphs. Nobody breaks the lane meanwhile: nothing runs that would have to be ended."""
        with self._capture:
            if self._broken:
                raise RuntimeError("the lane is broken")
            yield

    def hold(self, graph: Any) -> None:
        """Reset a graph that has messages of this lane in it before the lane is broken."""
        self._graphs.add(graph)

    def replay(self, graph: Any) -> None:
        """Launch a graph that was captured with messages of this lane.

        Raises:
            RuntimeError: the lane is broken.
        """
        with self._turn:
            graph.replay()

    def abort(self) -> None:
        """Break every connection: what waits for messages ends, here and on the peers. May wait for the device."""
        with self._capture:
            self._broken = True
            # It ends what a graph waits for, and then waits for the graphs.
            breaking = begun(self._break, "halovae-break")
        with self._turn:
            _reset(self._graphs)
        breaking.join()

    def _break(self) -> None:
        raise NotImplementedError


_begun: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_LAST_SECONDS = 5.0
"""That the end of the process waits for connections to be broken."""


def begun(run: Callable[[], object], name: str) -> threading.Thread:
    """A thread that waits in a backend, and that nobody has to wait for but the end of the process."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    _begun.add(thread)
    thread.start()
    return thread


@atexit.register
def _wait_for_begun() -> None:
    """Python ends its threads wherever they are: in a backend's C++, that aborts the process."""
    until = time.monotonic() + _LAST_SECONDS
    for thread in list(_begun):
        thread.join(max(0.0, until - time.monotonic()))


def _reset(graphs: weakref.WeakSet[Any]) -> None:
    for graph in list(graphs):
        graph.reset()  # One that is running still ends first.


class HostLane(TensorLane):
    """Moves what is in host memory, by gloo. Made by all ranks together."""

    def __init__(self, link: Link, rank: int, size: int) -> None:
        super().__init__()
        self._group: Any = dist.ProcessGroupGloo(Notes(link, "gloo/"), rank, size, _TIMEOUT)
        self._peers = [peer for peer in range(size) if peer != rank]

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        works = [self._group.recv([buffer], peer, 0) for peer, buffer in receives]
        return works + [self._group.send([tensor], peer, 0) for peer, tensor in sends]

    def _break(self) -> None:
        # Gloo breaks all of a group's connections when one wait of it is over time. It has to be one that is whole yet.
        for peer in self._peers:
            with suppress(RuntimeError):
                self._group.recv([torch.empty(1, device="cpu")], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))


class DeviceLane(TensorLane):
    """Moves what is in an accelerator's memory, through a backend that can ("nccl", "hccl", ...).

    Args:
        store: that all ranks share, for this lane alone.
    """

    def __init__(self, kind: str, device: torch.device, store: dist.Store, rank: int, size: int) -> None:
        super().__init__()
        self._device, self.has_graphs = device, kind == "nccl"
        self._backend, number = _backend(kind, store, rank, size)
        self._group = dist.ProcessGroup(store, rank, size)
        self._group._set_default_backend(number)
        self._group._register_backend(device, number, self._backend)
        if hasattr(self._backend, "eager_connect_single_device"):
            # Else the first messages would connect, and wait for ranks that have none.
            self._backend.eager_connect_single_device(device)

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        self._group._start_coalescing(self._device)
        for peer, buffer in receives:
            self._group.recv([buffer], peer, 0)
        for peer, tensor in sends:
            self._group.send([tensor], peer, 0)
        return [self._group._end_coalescing(self._device)]

    def _break(self) -> None:
        self._backend.abort()


def _raw(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise RuntimeError("only contiguous tensors travel")
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def _backend(kind: str, store: dist.Store, rank: int, size: int) -> tuple[Any, Any]:
    """The backend, and the number that torch gives its kind."""
    if kind == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options), dist.ProcessGroup.BackendType.NCCL
    plugin = _C10D.Backend._plugins[kind.upper()]
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, _TIMEOUT), dist.ProcessGroup.BackendType.CUSTOM
    options = _C10D._DistributedBackendOptions()
    options.store, options.group_rank, options.group_size, options.timeout = store, rank, size, _TIMEOUT
    options.group_id, options.global_ranks_in_group = f"halovae-{rank}-of-{size}", list(range(size))
    return plugin.creator_fn(options, None), dist.ProcessGroup.BackendType.CUSTOM
