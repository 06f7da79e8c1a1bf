"""A device that records, where there is none: the graphs, streams and events of `torch.cuda` over a CPU's operators.

    with recorder() as device:
        ...  # torch.device("cpu") records; device.log tells what was asked of it.

While a graph is captured nothing has a value yet: every new tensor is NaN until the graph is replayed, and whatever
asks for a value raises RuntimeError, as CUDA does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halovae.calls import device_graphs
from halovae.comm.backends import HostLane

_ANSWERS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default", "aten.is_nonzero.default"}


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: Recorder, name: str) -> None:
        self._device, self.name = device, name

    def wait_event(self, event: Event) -> None:
        self._device.log.append(("wait", self.name, event.recorded_on))


class Event:
    """As `torch.cuda.Event`."""

    def __init__(self) -> None:
        self.recorded_on = ""
        self.device: Recorder | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream.name
        stream._device.log.append(("record", stream.name))


class Graph(TorchDispatchMode):
    """As `torch.cuda.CUDAGraph`: the operators of a stretch."""

    device: Recorder

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.number = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local", "other threads would be disturbed"
        if self.device.capturing is not None:
            raise RuntimeError("a graph is being captured already")
        self.device.capturing = self
        self.device.graphs += 1
        self.number = self.device.graphs
        self.__enter__()

    def capture_end(self) -> None:
        if self.device.capturing is not self:
            raise RuntimeError("this graph is not being captured")
        self.device.capturing = None
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) in _ANSWERS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        if str(func).startswith("aten.set_."):  # A tensor is told where it is: nothing for the device to do.
            return func(*args, **kwargs)
        given = {_place(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel() and _place(t) not in given]
        for tensor in fresh:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        if not str(func).startswith("aten.empty"):
            self._steps.append((func, args, kwargs, out))
        return out

    def add(self, step: Callable[[], None]) -> None:
        """Something else that a replay does."""
        self._steps.append((step, (), {}, None))

    def reset(self) -> None:
        assert self.device.capturing is not self
        self._steps, self.number = [], 0

    def replay(self) -> None:
        assert self.device.capturing is None
        if not self.number:
            raise RuntimeError("replay without a preceding capture")
        self.device.log.append(("graph", self.number))
        for func, args, kwargs, out in self._steps:
            found = func(*args, **kwargs)
            for place, tensor in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(place, Tensor) and _place(place) != _place(tensor):
                    place.copy_(tensor)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """As the module `torch.cuda`, as far as it has to do with recording.

    Attributes:
        log: what was asked, in order.
        graphs: how many were begun.
        capturing: the graph that is being captured.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.graphs = 0
        self.capturing: Graph | None = None
        self.CPUGraph = type("CPUGraph", (Graph,), {"device": self})
        self.Event = Event
        self._stream = Stream(self, "default")

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def Stream(self, device: Any = None) -> Stream:
        return Stream(self, "recording")

    def stream(self, stream: Stream) -> Any:
        return nullcontext()

    def current_stream(self, device: Any = None) -> Stream:
        return self._stream

    def synchronize(self, device: Any = None) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def empty_cache(self) -> None:
        self.synchronize()


class InGraph:
    """Messages of a lane in a graph. As a device does, it goes on where the lane is broken."""

    def __init__(self, graph: Graph, post: Callable[[], list[Any]]) -> None:
        self._graph, self._post = graph, post
        self._works: list[Any] = []
        graph.add(self._begin)

    def _begin(self) -> None:
        self._works = []
        with suppress(RuntimeError):
            self._works = self._post()

    def wait(self) -> None:
        self._graph.add(self._end)

    def _end(self) -> None:
        with suppress(RuntimeError):
            for work in self._works:
                work.wait()


@contextmanager
def messages_in_graphs(device: Recorder) -> Iterator[None]:
    """Within it, the messages of ranks may be part of the device's graphs."""
    post = HostLane._post

    def in_graph(lane: HostLane, sends: Any, receives: Any) -> list[Any]:
        graph = device.capturing
        if graph is None:
            return post(lane, sends, receives)
        return [InGraph(graph, lambda: post(lane, sends, receives))]

    with patch.object(HostLane, "has_graphs", True), patch.object(HostLane, "_post", in_graph):
        yield


@contextmanager
def recorder() -> Iterator[Recorder]:
    """Within it, the CPU is a device that records."""
    device = Recorder()
    device_graphs._stream.cache_clear()
    with (
        patch.object(device_graphs, "RECORDERS", (*device_graphs.RECORDERS, "cpu")),
        patch.object(torch, "get_device_module", lambda *_: device),
    ):
        yield device
    device_graphs._stream.cache_clear()
    assert device.capturing is None, "a graph was left open"
