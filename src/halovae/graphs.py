"""Calls of one kind that come again: the second is recorded, and from the third on it is replayed without Python.

On a shard, an accelerator's kernels take less time than Python takes to ask for them. `Tape` keeps them.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.comm import Comm
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh
from halovae.exact.run import Call, on_shards
from halovae.kernels.weights import apart
from halovae.memory import PeakMemory
from halovae.state import ModuleState
from halovae.tape import Tape
from halovae.target import PLAIN, Target
from halovae.trees import map_tensors, tensors_in
from halovae.verify import TOLERANCE, distance, frozen_generators

LOG = logging.getLogger("halovae")
_STRICTER = 0.3
"""Than shards are compared: the same kernels ran on the same numbers, but some add up in any order."""


@dataclass(frozen=True)
class Recording:
    """A call that can be replayed: the tape, and where on the device its arguments and its result are."""

    key: Any
    tape: Tape
    arguments: Any
    result: Any
    growth: int
    """Bytes that the recording holds beyond its arguments."""

    def replay(self, arguments: Any) -> Any:
        """The result for other arguments of the same kind; in new memory."""
        for place, tensor in zip(tensors_in(self.arguments), tensors_in(arguments), strict=True):
            place.copy_(tensor)
        self.tape.replay()
        return map_tensors(_copied, self.result)


class Graphs:
    """The recordings of one rank: of each half the kind of call that came last. Every rank of the group makes one.

    Args:
        comm: the group. All its ranks have a shard.
        target: the VAE.

    Attributes:
        replayed: what the last call was replayed from, None where it was not.
    """

    def __init__(self, comm: Comm, target: Target) -> None:
        self._comm, self._target = comm, target
        self._recordings: dict[str, Recording] = {}
        self._last: dict[str, Any] = {}
        self._refused: set[Any] = set()
        self.replayed: Recording | None = None

    def forget(self) -> None:
        """Free what is kept."""
        self._recordings.clear()
        self._last.clear()
        self.replayed = None

    def run(
        self, half: str, kind: Any, mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # fmt: skip
        """As `on_shards`; all ranks replay, record, or do neither.

        Args:
            half: "encode" or "decode".
            kind: what the call depends on besides the weights and the values of its tensors.
            mesh: this rank's place.
            call: the un-parallel half.
            args: its arguments, cut.
            kwargs: likewise.
        """
        key = kind, self._places_of_weights()
        ways = set(self._comm.all_gather_object(self._way(half, key, (args, kwargs))))
        self.replayed = self._recordings[half] if ways == {"replay"} else None
        if self.replayed:
            return self.replayed.replay((args, kwargs))
        self._recordings.pop(half, None)  # This call may need the memory.
        self._last[half] = key
        if "plain" in ways:
            return on_shards(mesh, call, args, kwargs)
        return self._run_and_record(half, key, mesh, call, (args, kwargs))

    def _way(self, half: str, key: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
        """What this rank would do."""
        if half in self._recordings and self._recordings[half].key == key:
            return "replay"
        able = self._last.get(half) == key and key not in self._refused and _is_plain(*arguments)
        return "record" if able else "plain"

    def _places_of_weights(self) -> tuple[int, ...]:
        vae = self._target.vae
        return tuple(tensor.data_ptr() for tensors in (vae.parameters(), vae.buffers()) for tensor in tensors)

    def _run_and_record(self, half: str, key: Any, mesh: Mesh, call: Call, arguments: Any) -> Any:
        """The result of an ordinary call. A recording that gives another one is not kept."""
        args, kwargs = arguments = map_tensors(_copied, arguments)
        result = on_shards(mesh, call, args, kwargs)
        with frozen_generators(tensors_in(arguments)[0].device), ModuleState(self._target.vae).kept():
            recording = self._record(key, mesh, call, args, kwargs)
            able = all(self._comm.all_gather_object(recording is not None))
            if able and recording is not None:
                able = all(self._comm.all_gather_object(_is_near(recording.replay(arguments), result)))
        if able and recording is not None:
            self._recordings[half] = recording
        else:
            LOG.warning("%s of %s can't be replayed: it goes on as before", half, self._target.name)
            self._refused.add(key)
        return result

    def _record(
        self, key: Any, mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Recording | None:  # fmt: skip
        """Sends nothing, so a rank may fail in it by itself."""
        device = tensors_in((args, kwargs))[0].device
        tape = Tape(self._comm, device)
        gc.collect()
        memory = PeakMemory(device)
        try:
            # Weights are put in order on the tape too: what others keep of them may be freed.
            with apart(), tape.recording():
                result = on_shards(Mesh(tape, mesh.shape), call, args, kwargs)
        except Exception as error:  # Whatever asks the device for an answer, or finds no memory.
            LOG.info("a call of %s can't be recorded: %s", self._target.name, error)
            return None
        return Recording(key, tape, (args, kwargs), result, memory.growth)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call depends on nothing but its tensors on the device, and on what its kind tells."""
    return all(
        value.device.type != "cpu" if isinstance(value, Tensor) else isinstance(value, (*PLAIN, type(None)))
        for value in (*args, *kwargs.values())
    )


def _copied(tensor: Tensor) -> Tensor:
    return mark(tensor.clone(), layout_of(tensor))


def _is_near(found: Any, expected: Any) -> bool:
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    return all(_differ_little(*pair) for pair in pairs)


def _differ_little(found: Tensor, expected: Tensor) -> bool:
    if torch.equal(found, expected):
        return True
    return found.is_floating_point() and distance(found, expected) <= _STRICTER * TOLERANCE.get(found.dtype, 1e-1)
