"""One call of a network on shards: cut the inputs, run, put the outputs together, share them with spare ranks."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import InputError, NotExactError
from halovae.base.geometry import Extent
from halovae.base.trees import contents, hidden_tensors, is_picture, map_tensors, pictures_in, tensors_in, walk
from halovae.comm import Comm
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh
from halovae.exact.partition import Bounds, extents, first_tensor, gather, own_copy, own_rows, scatter
from halovae.exact.shard_mode import ShardMode
from halovae.kernels.fast_mode import FastMode, finished

Call = Callable[..., Any]
Runner = Callable[[Mesh, Call, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call on shards: `on_shards`, or what stands in for it."""


class Given:
    """A call's arguments on one rank: pictures cut, and everything in copies, so that the caller's stay as they are.

    Pictures of another size than the first one are cut at the same relative places.

    Args:
        mesh: the grid of shards.
        args: whole, the same on every rank.
        kwargs: likewise.
        bounds: where the first picture is cut.
    """

    def __init__(self, mesh: Mesh, args: tuple[Any, ...], kwargs: dict[str, Any], bounds: Bounds) -> None:
        self._mesh, self._bounds = mesh, bounds
        self._versions: list[tuple[Tensor, int]] = []
        self.args, self.kwargs = map_tensors(self._own, (args, kwargs))
        theirs = {id(item) for item in walk((args, kwargs))}
        self._held = [(item, contents(item), id(item) in theirs) for item in walk((self.args, self.kwargs))]

    def _own(self, tensor: Tensor) -> Tensor:
        is_cut = is_picture(tensor)
        mine = scatter(self._mesh, tensor, _scaled(self._bounds, tensor)) if is_cut else own_copy(tensor)
        self._versions.append((mine, mine._version))
        return mine

    def written(self) -> dict[int, Tensor]:
        """The tensors into which the network has written, whole, by their place in `tensors_in((args, kwargs))`.

        Raises:
            NotExactError: it has changed arguments in another way.
        """
        for item, before, is_theirs in self._held:
            now = contents(item)
            changed = len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))
            if changed and not (is_theirs and not any(map(layout_of, walk(now)))):
                raise NotExactError(f"the network changes a {type(item).__name__} among its arguments")
        changed = ((i, t) for i, (t, version) in enumerate(self._versions) if t._version != version)
        return {i: gather(self._mesh, tensor) for i, tensor in changed}


def run_sharded(mesh: Mesh, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], bounds: Bounds) -> Any:
    """`call(*args, **kwargs)` on this rank's shards of the pictures in the arguments; its result is in shards.

    Raises:
        NotExactError: an operator can't be sharded, or the result lost track of its shards.
    """
    given = Given(mesh, args, kwargs, bounds)
    return on_shards(mesh, call, given.args, given.kwargs)


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
        raise NotExactError(
            f"a picture {tuple(tensor.shape)} in the result is not told to be of shards: an operation left torch, "
            "or it is made of sizes alone"
        )
    return tensor


def _scaled(bounds: Bounds, picture: Tensor) -> Bounds:
    scaled: list[tuple[int, ...]] = []
    for axis_bounds, size in zip(bounds, picture.shape[-2:], strict=True):
        whole = axis_bounds[-1]
        if size == 1:  # the same for all positions
            scaled.append((0, 1))
            continue
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
        result = _wait_for_result(comm, keep, args, kwargs)
        return Outcome(result, {"height": (0, 0), "width": (0, 0)}, 0.0, time.perf_counter() - started)
    mesh = Mesh(comm, shape)
    started = time.perf_counter()
    if comm.size == 1:
        result = run(mesh, call, args, kwargs)
        return Outcome(result, extents(mesh, first_tensor(result)), time.perf_counter() - started, 0.0)
    given = Given(mesh, args, kwargs, bounds)
    result = run(mesh, call, given.args, given.kwargs)
    mine = extents(mesh, first_tensor(result))
    ran = time.perf_counter()
    result, written = map_tensors(lambda t: _collect(mesh, t, keep), result), given.written()
    check_whole(result)
    if spares:
        _share_result(comm, result, written, spares, keep)
    _write_back(written, args, kwargs)
    return Outcome(result, mine, ran - started, time.perf_counter() - ran)


def _write_back(written: dict[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the un-parallel network would have written into its arguments; after a call that has gone well."""
    theirs = tensors_in((args, kwargs)) if written else []
    for place, tensor in written.items():
        theirs[place].copy_(tensor)


def check_whole(result: Any) -> None:
    """Check that no shard is left in a result.

    Raises:
        NotExactError: something holds one that can't be put together.
    """
    for holder, tensor in hidden_tensors(result):
        if layout_of(tensor):
            raise NotExactError(f"the result holds a {holder}, in which shards can't be put together")


def _collect(mesh: Mesh, tensor: Tensor, keep: str) -> Tensor:
    return own_rows(mesh, tensor) if keep == "shard" else gather(mesh, tensor, first_only=keep == "first")


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a result that travels without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _share_result(comm: Comm, result: Any, written: dict[int, Tensor], spares: range, keep: str) -> None:
    """Tell the spare ranks the result and what was written into arguments; of tensors that they don't hold, shapes.

    Raises:
        NotExactError: the result can't be sent.
    """
    said: bytes | None = None
    tensors: list[Tensor] = []

    def leave_slot(tensor: Tensor) -> Any:
        tensors.append(tensor.contiguous())
        return _Slot(tuple(tensor.shape), tensor.dtype)

    if comm.rank == 0:
        changes = map_tensors(leave_slot, written)
        skeleton = map_tensors(leave_slot if keep == "all" else _slot_of, result)
        try:
            said = pickle.dumps((changes, skeleton))
            pickle.loads(said)  # What fails here would fail there.
        except Exception as error:
            name = type(result).__name__
            raise NotExactError(f"a {name} can't be sent to ranks without a shard: {error}") from error
    comm.all_gather_object(said)
    if comm.rank == 0:
        comm.exchange([(spare, tensor) for spare in spares for tensor in tensors], [])


def _slot_of(tensor: Tensor) -> _Slot:
    return _Slot(tuple(tensor.shape), tensor.dtype)


def _wait_for_result(comm: Comm, keep: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changes, skeleton = pickle.loads(comm.all_gather_object(None)[0])
    device = pictures_in((args, kwargs))[0].device
    buffers: list[Tensor] = []

    def fill_slot(slot: _Slot) -> Tensor:
        buffers.append(torch.empty(slot.shape, dtype=slot.dtype, device=device))
        return buffers[-1]

    def nothing(slot: _Slot) -> Tensor:
        return torch.empty((*slot.shape[:-2], 0, 0)[: len(slot.shape)], dtype=slot.dtype, device=device)

    written = map_tensors(fill_slot, changes, kind=_Slot)
    result = map_tensors(fill_slot if keep == "all" else nothing, skeleton, kind=_Slot)
    comm.exchange([], [(0, buffer) for buffer in buffers])
    _write_back(written, args, kwargs)
    return result
