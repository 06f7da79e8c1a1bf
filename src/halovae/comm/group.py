"""A torch.distributed process group as a `Comm`: tensors by its kind of backend, everything else by the link."""

from __future__ import annotations

import secrets
import time
import traceback
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from halovae.base.errors import InputError, RankFailedError
from halovae.base.forks import owned_here
from halovae.base.functions import outside_modes
from halovae.comm.backends import DeviceLane, HostLane, TensorLane, begun, store_of
from halovae.comm.control import Link
from halovae.comm.environment import default_device, launched_ranks
from halovae.comm.protocol import Comm, GraphLane, Message, Nothing, Pending, SoloComm, Start

Group = dist.ProcessGroup | DeviceMesh
"""What callers name their ranks by; a mesh of one dimension."""

_inherited: list[Any] = []
"""In a forked child, groups of its parent. Destroyed there they would wait for threads that only the parent has."""
_NEWS_SECONDS = 5.0
"""How long after a broken exchange the news of who broke it may take."""


@dataclass(eq=False)
class _Posted:
    """Messages that a process group is moving; holds on to their memory."""

    comm: GroupComm
    works: Sequence[dist.Work]
    receives: Sequence[Message]
    landing: Sequence[Message]
    staged: Sequence[Message]

    @outside_modes
    def wait(self) -> None:
        if self not in self.comm.under_way:
            return
        started = time.perf_counter()
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise self.comm.blamed(error) from error
        for (_, buffer), (_, landed) in zip(self.receives, self.landing, strict=True):
            if landed is not buffer:
                buffer.copy_(landed)
        self.comm.under_way.discard(self)
        self.comm.traffic.waited_since(started)


class GroupComm(Comm):
    """A torch.distributed process group. Made by all its ranks together.

    Where a backend can't move the device's tensors (gloo with accelerator tensors), messages are staged through host
    memory.

    Attributes:
        under_way: what is posted and not waited for. Their memory must outlive them, also where nobody waits.

    Raises:
        InputError: this process is not in `group`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise InputError(
                f"process {dist.get_rank()} is not in the given group: call parallelize only on the group's ranks"
            )
        self.size = dist.get_world_size(group)
        self.under_way: set[_Posted] = set()
        self._group = group
        self._lanes: dict[str, TensorLane] = {}
        self.era = -1

        def share(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=group)
            return values

        self._name = share(secrets.token_hex(8))[0]
        # Weak, and closed at the end: the thread of the link must not outlive what nobody uses any more.
        abort = weakref.WeakMethod(self._abort_beside)
        self._link = Link(self.rank, self.size, share, lambda: (found := abort()) and found())
        self._closed = weakref.finalize(self, self._link.close)
        owned_here(self, GroupComm._disown)
        self._connect()

    def set_patience(self, seconds: float) -> None:
        self._link.set_patience(seconds)

    # ---- tensors -------------------------------------------------------------------------------------------------

    @outside_modes
    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self._link.check()
        if not sends and not receives:
            return Nothing()
        started = time.perf_counter()
        lanes = self._lanes
        landing = [(p, t if t.device.type in lanes else torch.empty_like(t, device="cpu")) for p, t in receives]
        staged = [(p, t if t.device.type in lanes else t.cpu()) for p, t in sends]
        lane = lanes[(landing or staged)[0][1].device.type]
        try:
            works = lane.post(staged, landing)
        except RuntimeError as error:
            raise self.blamed(error) from error
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for _, tensor in sends)
        self.traffic.waited_since(started)
        posted = _Posted(self, works, receives, landing, staged)
        self.under_way.add(posted)
        return posted

    def lane_of_graphs(self, device: torch.device) -> GraphLane | None:
        lane = self._lanes.get(device.type)
        return lane if lane and lane.has_graphs else None

    def blamed(self, error: RuntimeError) -> RuntimeError:
        """Why an exchange broke: the failure of another rank, of which news may still be under way, or `error`."""
        deadline = time.monotonic() + _NEWS_SECONDS
        while not self._link.troubled and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            self._link.check()
        except RankFailedError as known:
            return known
        return error

    # ---- calls -----------------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._link.gather(value, self.starting)

    def forgo(self, start: Start, why: Any) -> None:
        self._link.forgo(start, why)

    def begin(self) -> None:
        self._link.check()
        self._link.busy = True
        if self.era != self._link.era:
            self._link.gather(None, self.starting)  # Who does not come is named by it; lanes can't tell.
            self._connect()

    def check(self) -> None:
        if self._link.troubled:
            self._link.check()

    def synchronize(self) -> None:
        if len(self._lanes) > 1:
            with self._link.limited():
                torch.accelerator.synchronize()

    def finish(self) -> None:
        for posted in list(self.under_way):
            posted.wait()
        self.synchronize()  # What a device still has to do may depend on messages that never come.
        self._link.gather(None)
        self._link.busy = False

    def fail(self, error: BaseException) -> None:
        kind = type(error).__name__
        self._link.fail(f"{kind}: {error}", "".join(traceback.format_exception(error)), kind)
        self._abort()
        self.under_way.clear()
        self._link.busy = False
        self._link.next_era()

    def close(self) -> None:
        self._closed()
        self._lanes = {}

    def _connect(self) -> None:
        """New lanes for this era."""
        self._lanes, self.era = {}, self._link.era
        try:
            lanes: dict[str, TensorLane] = {"cpu": HostLane(self._link, self.rank, self.size)}
            kind, device = _device_backend(self._group)
            if kind != "gloo":
                prefix = f"halovae/{self._name}/{self.era}"
                store = dist.PrefixStore(prefix, store_of(self._group))
                lanes[device.type] = DeviceLane(kind, device, store, self.rank, self.size)
        except RuntimeError as error:
            raise self.blamed(error) from error
        self._lanes = lanes
        if self._link.troubled:  # It came too late to break them.
            self._abort()
            self._link.check()

    def _disown(self) -> None:
        _inherited.append((self._lanes, self.under_way))
        self._lanes, self.under_way = {}, set()

    def _abort(self) -> None:
        for lane in self._lanes.values():
            lane.abort()

    def _abort_beside(self) -> None:
        """Without waiting for this rank's own work, which may be about to ask who has failed."""
        lanes = list(self._lanes.values())  # Those of now: the next era has others.
        with suppress(RuntimeError):  # Python is ending.
            begun(lambda: [lane.abort() for lane in lanes], "halovae-abort")


def connect(group: Group | None = None) -> Comm:
    """The `Comm` of a process group, of a one-dimensional device mesh, or (None) of the world. Called on all its ranks.

    Without an initialised torch.distributed the world is this one process.

    Raises:
        InputError: a launcher has started several processes, and they have no group; the mesh has more than one
            dimension; or this process is not in the group.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(
                f"group is a {group.ndim}-dimensional DeviceMesh: pass one of its dimensions, as in mesh['vae']"
            )
        group = group.get_group()
    if group is None:
        if not dist.is_initialized():
            if launched_ranks() > 1:
                raise InputError(
                    f"{launched_ranks()} processes were started (WORLD_SIZE), but this one has joined no group of them "
                    "and would run alone: call torch.distributed.init_process_group() first, or halovae.optimize(vae) "
                    "to let each process run alone"
                )
            return SoloComm()
        group = dist.group.WORLD
    if any(dist.group.WORLD is each for each in _inherited):
        raise InputError("this process was forked from a rank and has no part in its group: start it by itself (spawn)")
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"group is {group!r}, not a process group that this process belongs to: call parallelize on its ranks only"
        )
    return GroupComm(group) if dist.get_world_size(group) > 1 else SoloComm()


def _inherit_world(torch_distributed: Any) -> None:
    if dist.is_initialized():
        _inherited.append(dist.group.WORLD)


owned_here(dist, _inherit_world)


def world() -> Comm:
    """The `Comm` of the whole world."""
    return connect(None)


def _device_backend(group: dist.ProcessGroup) -> tuple[str, torch.device]:
    """The backend that serves the default device in `group`; one may have several ("cpu:gloo,cuda:nccl")."""
    device = default_device()
    config = dist.get_backend_config(group)
    pairs = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return ("gloo" if device.type == "cpu" else pairs.get(device.type, config)), device
