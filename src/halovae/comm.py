"""The only door to torch.distributed: groups, exchanges, gathers and small agreements.

Ranks here are always indices in the group; only this module knows global ranks. Where a backend can't move the
device's tensors point to point (gloo with accelerator tensors), messages are staged through host memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from halovae.errors import InputError

Group = dist.ProcessGroup | DeviceMesh
"""What callers name their ranks by; a mesh of one dimension."""

Message = tuple[int, Tensor]


@dataclass
class Traffic:
    """What this rank sent and how long it waited, summed since the last reset."""

    messages: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0


class Pending(Protocol):
    """Messages under way. The tensors posted belong to them until `wait` returns."""

    def wait(self) -> None:
        """Return when everything is sent and every buffer is filled."""
        ...


class Comm(Protocol):
    """What the layers above need of a group of ranks.

    Attributes:
        rank: index of this process in the group.
        size: number of ranks in the group.
        traffic: counters of this rank, replaced by `reset_traffic`.
    """

    rank: int
    size: int
    traffic: Traffic

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send contiguous tensors to peers and fill contiguous buffers from peers; returns when all are done.

        Messages between one pair of ranks arrive in the order of the lists.
        """
        ...

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Begin an exchange and return at once.

        Exchanges between ranks pair up in the order they are posted, so all ranks post theirs in the same order.
        """
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, in rank order."""
        ...


def all_gather(comm: Comm, value: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The tensors of `ranks`, in that order; all have the shape and dtype of `value`. Called by each of `ranks`."""
    value = value.contiguous()
    gathered = [value if rank == comm.rank else torch.empty_like(value) for rank in ranks]
    peers = [rank for rank in ranks if rank != comm.rank]
    received = [(rank, buffer) for rank, buffer in zip(ranks, gathered, strict=True) if rank != comm.rank]
    comm.exchange([(rank, value) for rank in peers], received)
    return gathered


class _Nothing:
    """The pending messages of an exchange that has none."""

    def wait(self) -> None:
        return


class SoloComm:
    """A group of one: nothing to send."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.post(sends, receives)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        assert not sends, "a group of one has no peers"
        assert not receives, "a group of one has no peers"
        return _Nothing()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class _Posted:
    """Messages that a process group is moving; holds on to their memory."""

    traffic: Traffic
    works: Sequence[dist.Work]
    receives: Sequence[Message]
    landing: Sequence[Message]
    staged: Sequence[Message]

    def wait(self) -> None:
        started = time.perf_counter()
        for work in self.works:
            work.wait()
        for (_, buffer), (_, landed) in zip(self.receives, self.landing, strict=True):
            if landed is not buffer:
                buffer.copy_(landed)
        self.traffic.wait_seconds += time.perf_counter() - started


class GroupComm:
    """A torch.distributed process group.

    Args:
        group: the process group this process belongs to.

    Raises:
        InputError: this process is not in `group`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise InputError(
                f"process {dist.get_rank()} is not in the given group: call parallelize only on the group's ranks"
            )
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()
        self._group = group
        self._global = dist.get_process_group_ranks(group)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.post(sends, receives).wait()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return _Nothing()
        started = time.perf_counter()
        landing = [(peer, self._landing(buffer)) for peer, buffer in receives]
        staged = [(peer, self._staged(tensor)) for peer, tensor in sends]
        operations = [self._operation(dist.irecv, peer, buffer) for peer, buffer in landing]
        operations += [self._operation(dist.isend, peer, tensor) for peer, tensor in staged]
        posted = _Posted(self.traffic, dist.batch_isend_irecv(operations), receives, landing, staged)
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for _, tensor in sends)
        self.traffic.wait_seconds += time.perf_counter() - started
        return posted

    def _by_host(self, tensor: Tensor) -> bool:
        """Whether the backend can't move the device's tensors point to point."""
        return tensor.device.type != "cpu" and _backend(self._group, tensor.device) == "gloo"

    def _staged(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._by_host(tensor) else tensor

    def _landing(self, buffer: Tensor) -> Tensor:
        return torch.empty_like(buffer, device="cpu") if self._by_host(buffer) else buffer

    def _operation(self, kind: Any, peer: int, tensor: Tensor) -> dist.P2POp:
        assert tensor.is_contiguous(), "only contiguous tensors travel"
        # Bytes travel: no backend then needs to know the dtype.
        raw = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
        return dist.P2POp(kind, raw, self._global[peer], self._group)

    def all_gather_object(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


def connect(group: Group | None = None) -> Comm:
    """The `Comm` of a process group, of a one-dimensional device mesh, or (None) of the world.

    Without an initialised torch.distributed the world is this one process.

    Raises:
        InputError: the mesh has more than one dimension, or this process is not in the group.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(
                f"group is a {group.ndim}-dimensional DeviceMesh: pass one of its dimensions, as in mesh['vae']"
            )
        group = group.get_group()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SoloComm()
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"group is {group!r}, not a process group that this process belongs to: call parallelize on its ranks only"
        )
    return GroupComm(group) if dist.get_world_size(group) > 1 else SoloComm()


def init_from_env(device: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Does nothing in a world of one, or when a group exists. The backend is the default one of the device.

    Raises:
        InputError: the environment names a world but not this process's place in it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start with torchrun or --ranks")
    kind = torch.device(device).type if device else default_device().type
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(dist.get_default_backend_for_device(kind), timeout=timeout)


def shutdown() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> Comm:
    """The `Comm` of the whole world."""
    return connect(None)


def default_device() -> torch.device:
    """The current accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random functions on `device` use when they are given none."""
    if device.type == "cpu":
        return torch.default_generator
    generators = torch.get_device_module(device).default_generators
    index: int | None = getattr(device, "index", None)  # None for "cuda", whatever its stub says
    return generators[torch.accelerator.current_device_index() if index is None else index]


def backend_name() -> str:
    """The default group's backend, or "none" in a world of one."""
    return str(dist.get_backend()) if dist.is_available() and dist.is_initialized() else "none"


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that serves `device` in `group`; a group may have one per device type ("cpu:gloo,cuda:nccl")."""
    config = dist.get_backend_config(group)
    pairs = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return pairs.get(device.type, config)
