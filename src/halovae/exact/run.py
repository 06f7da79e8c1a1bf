"""One call of a network on shards: cut the inputs, run, put the outputs together, share them with spare ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.comm import Comm
from halovae.errors import InputError, NotExactError
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh
from halovae.exact.mode import ShardMode
from halovae.exact.partition import Bounds, extents, first_tensor, gather, own_rows, scatter
from halovae.geometry import Extent
from halovae.kernels.mode import FastMode, finished
from halovae.trees import is_picture, map_tensors

Call = Callable[..., Any]
Runner = Callable[[Mesh, Call, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call on shards: `on_shards`, or what stands in for it."""


def run_sharded(mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], bounds: Bounds) -> Any:
    """`call(*args, **kwargs)` on this rank's shards of the pictures in the arguments; its result is in shards.

    Pictures of another size than the first one are cut at the same relative places.

    Raises:
        NotExactError: an operator can't be sharded, or the result lost track of its shards.
    """
    return on_shards(mesh, call, *_cut(mesh, args, kwargs, bounds))


def _cut(
    mesh: Mesh, args: tuple[Any, ...], kwargs: dict[str, Any], bounds: Bounds
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return scatter(mesh, value, _scaled(bounds, value)) if is_picture(value) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def on_shards(mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `run_sharded`, with arguments that are cut already."""
    # Rules call torch functions; the fast mode, entered first, receives them.
    with FastMode(), ShardMode(mesh) if mesh.size > 1 else nullcontext():
        result = call(*args, **kwargs)
    result = map_tensors(lambda t: mark(finished(t), layout_of(t)), result)
    if mesh.size > 1:
        first_tensor(result)  # there is one
        map_tensors(_check_tracked, result)
    return result


def _check_tracked(tensor: Tensor) -> Tensor:
    if is_picture(tensor) and tensor.shape[-2:] != (1, 1) and layout_of(tensor) is None:
        raise NotExactError("the network's result lost track of its shards: an operation left torch")
    return tensor


def _scaled(bounds: Bounds, picture: Tensor) -> Bounds:
    scaled: list[tuple[int, ...]] = []
    for axis_bounds, size in zip(bounds, picture.shape[-2:], strict=True):
        whole = axis_bounds[-1]
        if size != whole and any(b * size % whole for b in axis_bounds):
            raise InputError(f"pictures of {whole} and {size} rows or columns can't be cut at the same places")
        scaled.append(tuple(b * size // whole for b in axis_bounds))
    return scaled[0], scaled[1]


@dataclass(frozen=True)
class Outcome:
    """A result, which part of it this rank computed, and how long network and gather took."""

    result: Any
    extents: dict[str, Extent]
    network_seconds: float
    gather_seconds: float


def run_on_group(
    comm: Comm, shape: tuple[int, int], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], bounds: Bounds,
    keep: str, run: Runner = on_shards,
) -> Outcome:  # fmt: skip
    """Run on the first rows * cols ranks; ranks beyond wait and share the result.

    Args:
        comm: the group; every rank of it calls this.
        shape: rows and columns of shards.
        call: the un-parallel half.
        args: its arguments, whole, the same on every rank.
        kwargs: likewise.
        bounds: where the first picture is cut.
        keep: "all", "first" or "shard": who holds the whole result.
        run: makes the call on shards.
    """
    spares = range(shape[0] * shape[1], comm.size)
    if comm.rank in spares:
        started = time.perf_counter()
        result = _wait_for_result(comm, keep, _device_of((*args, *kwargs.values())))
        return Outcome(result, {"height": (0, 0), "width": (0, 0)}, 0.0, time.perf_counter() - started)
    mesh = Mesh(comm, shape)
    started = time.perf_counter()
    result = run(mesh, call, *_cut(mesh, args, kwargs, bounds))
    mine = extents(mesh, first_tensor(result))
    ran = time.perf_counter()
    result = map_tensors(lambda t: _collect(mesh, t, keep), result)
    if spares:
        _share_result(comm, result, spares, keep)
    return Outcome(result, mine, ran - started, time.perf_counter() - ran)


def _device_of(values: tuple[Any, ...]) -> torch.device:
    return next(value.device for value in values if is_picture(value))


def _collect(mesh: Mesh, tensor: Tensor, keep: str) -> Tensor:
    return own_rows(mesh, tensor) if keep == "shard" else gather(mesh, tensor, first_only=keep == "first")


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a result that travels without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _share_result(comm: Comm, result: Any, spares: range, keep: str) -> None:
    """Tell the spare ranks the shape of the result and, if they are to hold it, its tensors from the first rank."""
    tensors: list[Tensor] = []

    def leave_slot(tensor: Tensor) -> Any:
        tensors.append(tensor.contiguous())
        return _Slot(tuple(tensor.shape), tensor.dtype)

    skeleton = map_tensors(leave_slot, result)
    comm.all_gather_object(skeleton if comm.rank == 0 else None)
    if comm.rank == 0 and keep == "all":
        comm.exchange([(spare, tensor) for spare in spares for tensor in tensors], [])


def _wait_for_result(comm: Comm, keep: str, device: torch.device) -> Any:
    said = comm.all_gather_object(None)
    buffers: list[Tensor] = []

    def fill_slot(slot: _Slot) -> Tensor:
        shape = slot.shape if keep == "all" else (*slot.shape[:-2], 0, 0)
        buffers.append(torch.empty(shape, dtype=slot.dtype, device=device))
        return buffers[-1]

    result = map_tensors(fill_slot, said[0], kind=_Slot)
    if keep == "all":
        comm.exchange([], [(0, buffer) for buffer in buffers])
    return result
