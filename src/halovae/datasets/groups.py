"""Encoders as Ray's actors: one device each, or a group of devices that encodes a unit as shards."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import socket
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from halovae.datasets.units import Job, Unit
from halovae.datasets.workers import FAILED, MEMORY, Device, Row, reason_of

_TRIES = 3
"""Times that a group whose ranks die is put together again for one unit."""


_NAMES = "halovae-"
"""How those of placement groups begin."""


def release(names: str = _NAMES) -> None:
    """Give back the devices of this run's groups: Ray keeps them for a run, also when those that asked are gone.

    Args:
        names: how those of the groups begin.
    """
    for row in placement_group_table().values():
        if row["name"].startswith(names) and row["state"] != "REMOVED":
            with suppress(ValueError):  # It is of another run.
                remove_placement_group(get_placement_group(row["name"]))


class Encoder:
    """Encodes units on one device, or on a group of them as shards."""

    def __init__(self, job: Job, ranks: int) -> None:
        self._encode = (Device(job) if ranks == 1 else _Group(job, ranks)).encode

    def __call__(self, row: Row) -> Row:
        unit: Unit = pickle.loads(row["unit"])
        made = self._encode(row["pixels"], f"encode {unit.keys}") if len(row["pixels"]) else {}
        latents = made.pop("latents", np.zeros((0, 0), np.uint8))
        return {"unit": row["unit"], "read": row["read"], "made": json.dumps(made), "latents": latents}


class _Group:
    """Ranks on devices of their own, in one process group."""

    def __init__(self, job: Job, ranks: int) -> None:
        self._job, self._ranks = job, ranks
        self._actors: list[Any] = []
        self._lock = threading.Lock()
        # The same when Ray starts this process again after its death.
        self._names = f"{_NAMES}{ray.get_runtime_context().get_actor_id()}-"

    def encode(self, pixels: np.ndarray[Any, Any], name: str) -> dict[str, Any]:
        """As `Device.encode`. What ends ranks is counted here, and needs no name."""
        shared, why = ray.put(pixels), ""
        with self._lock:
            for _ in range(_TRIES):
                try:
                    if not self._actors:
                        self._start()
                    answers = ray.get([actor.encode.remote(shared) for actor in self._actors])
                except RayActorError as error:  # Also of one that dies while the group comes together.
                    why = reason_of(error)
                    self._end()
                    continue
                faults = [answer for answer in answers if "why" in answer]
                return next((fault for fault in faults if fault["kind"] == MEMORY), faults[0]) if faults else answers[0]
        return {"kind": FAILED, "why": f"its group of {self._ranks} devices died {_TRIES} times: {why}"}

    def _start(self) -> None:
        release(self._names)
        share = {"CPU": 1.0} if self._job.device == "cpu" else {"GPU": 1.0}
        place = placement_group([share] * self._ranks, strategy="PACK", name=self._names + secrets.token_hex(4))
        ray.get(place.ready())
        remote: Any = ray.remote(_Rank)
        self._actors = [
            remote.options(
                num_cpus=share.get("CPU", 0), num_gpus=share.get("GPU", 0), max_concurrency=1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(self._ranks)
        ]  # fmt: skip
        address = ray.get(self._actors[0].address.remote())
        ray.get([actor.join.remote(self._job, r, self._ranks, address) for r, actor in enumerate(self._actors)])

    def _end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class _Rank:
    """One process of a group."""

    def __init__(self) -> None:
        self._device: Device | None = None

    def address(self) -> tuple[str, int]:
        """Where this process can be reached by the others, and a port that is free."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def join(self, job: Job, rank: int, ranks: int, address: tuple[str, int]) -> None:
        self._device = Device(job, rank, ranks, address)

    def encode(self, pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
        assert self._device is not None
        found = self._device.encode(pixels)
        # The first rank has the whole: nobody needs the others' parts.
        return found if "why" in found or os.environ["RANK"] == "0" else {}
