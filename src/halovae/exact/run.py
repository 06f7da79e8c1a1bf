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

from halovae.base.errors import HalovaeError, InputError, NotExactError
from halovae.base.functions import outside_modes
from halovae.base.geometry import Extent, cut_at
from halovae.base.private_torch import version
from halovae.base.trees import contents, hidden_tensors, is_picture, map_tensors, pictures_in, tensors_in, walk
from halovae.comm import Comm
from halovae.exact.halo import extend, gather_dim, own
from halovae.exact.layout import AxisFactor, Layout, layout_of, mark, plain, require_axis
from halovae.exact.mesh import Mesh, ShardPlan
from halovae.exact.rules import attention, elementwise, factories, indexing, norms, views, windows
from halovae.exact.shard_mode import ShardMode
from halovae.kernels.fast_mode import FastMode, finished
from halovae.kernels.gpu import compiled_ahead

RULE_MODULES = attention, elementwise, factories, indexing, norms, views, windows
"""Imported for their rules."""

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""Where rows and where columns are cut: (0, ..., height) and (0, ..., width)."""


@outside_modes
def scatter(mesh: Mesh, tensor: Tensor, bounds: Bounds) -> Tensor:
    """This rank's shard of a tensor `[..., height, width]` that every rank has whole, in memory of its own."""
    dims = [plain(size) for size in tensor.shape]
    for axis, axis_bounds in enumerate(bounds):
        if mesh.shape[axis] == 1 or tensor.shape[axis - 2] == 1:
            continue
        cut, part, dim = cut_at(axis_bounds), mesh.part(axis), axis - 2
        if (cut.size, cut.parts) != (tensor.shape[dim], mesh.shape[axis]):
            raise HalovaeError(f"cuts {axis_bounds} of {tensor.shape[dim]} rows for {mesh.shape[axis]} parts")
        low, high = cut.owned(part)
        tensor = tensor.narrow(dim, low, high - low)
        dims[dim] = (AxisFactor(high - low, axis, cut),)
    return mark(own_copy(tensor), Layout(tuple(dims)))


def own_copy(tensor: Tensor) -> Tensor:
    """A copy that tells, by its version, whether a network has written into it."""
    with torch.inference_mode(False):
        return tensor.clone()


@outside_modes
def gather(mesh: Mesh, tensor: Tensor, first_only: bool = False) -> Tensor:
    """The whole tensor on every rank of the mesh, or (`first_only`) on its first rank and the own shard elsewhere."""
    layout = layout_of(tensor)
    if layout is None:
        return tensor
    if first_only:
        return _gather_first(mesh, *own(mesh, tensor, layout))
    for dim in layout.sharded_dims:
        tensor = gather_dim(mesh, tensor, layout, dim)
        layout = layout.replace(dim, plain(tensor.shape[dim]))
    return tensor


def _gather_first(mesh: Mesh, shard: Tensor, layout: Layout) -> Tensor:
    """Along the first axis to the ranks at its beginning, then among those along the second one."""
    tensor = shard
    factors = [(require_axis(layout, dim), dim) for dim in layout.sharded_dims]
    for factor, dim in sorted(factors, key=lambda pair: pair[0].axis):
        if any(mesh.part(axis) for axis in range(factor.axis)):
            break
        needs = [(0, factor.cut.size), *factor.cut.extents[1:]]
        tensor = extend(mesh, tensor, layout, {dim: tuple(needs)})
        if mesh.part(factor.axis) == 0:
            layout = layout.replace(dim, plain(factor.cut.size))
    return _unmarked(shard if any(mesh.coordinates) else tensor)


def _unmarked(tensor: Tensor) -> Tensor:
    """The tensor without a layout; another object, because the network may still hold this one."""
    return tensor.view(tensor.shape) if layout_of(tensor) else tensor


def extents(mesh: Mesh, tensor: Tensor) -> dict[str, Extent]:
    """Which rows and columns of the whole this rank's shard is, as {"height": (low, high), "width": (low, high)}."""
    layout = layout_of(tensor)
    found: dict[str, Extent] = {"height": (0, tensor.shape[-2]), "width": (0, tensor.shape[-1])}
    if layout is None:
        return found
    for factor in (require_axis(layout, dim) for dim in layout.sharded_dims):
        found[("height", "width")[factor.axis]] = factor.cut.owned(mesh.part(factor.axis))
    return found


def first_tensor(value: Any) -> Tensor:
    """The first picture-like tensor (4-D or 5-D) in a result.

    Raises:
        NotExactError: there is none.
    """
    pictures = pictures_in(value)
    if not pictures:
        raise NotExactError(f"the result {type(value).__name__} holds no picture or video tensor")
    return pictures[0]


# ---- a call ---------------------------------------------------------------------------------------------------------


Call = Callable[..., Any]
Runner = Callable[[Mesh, Call, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call on shards: `on_shards`, or what stands in for it."""


class Given:
    """A call's arguments on one rank: pictures cut, and everything in copies, so that the caller's stay as they are.

    Pictures of another size than the first one are cut at the same relative places.

    Args:
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
        self._versions.append((mine, version(mine)))
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
        changed = ((i, t) for i, (t, before) in enumerate(self._versions) if version(t) != before)
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
    compiled_ahead.wait()
    # Rules call torch functions; the fast mode, entered first, receives them.
    with FastMode(), ShardMode(mesh) if mesh.size > 1 else nullcontext(), attention.flex_attention_by_rule(mesh):
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


class GroupRun:
    """One call on the first rows * cols ranks of a group; ranks beyond wait and share the result.

    Args:
        keep: "all", "first" or "shard": who holds the whole result.

    Attributes:
        extents: which part of the result this rank computed.
        network_seconds: how long the network took.
        gather_seconds: how long it took to put its result together.
    """

    def __init__(
        self, comm: Comm, plan: ShardPlan, args: tuple[Any, ...], kwargs: dict[str, Any], keep: str
    ) -> None:  # fmt: skip
        self._comm, self._plan, self._args, self._kwargs, self._keep = comm, plan, args, kwargs, keep
        self._spares = range(plan.shape[0] * plan.shape[1], comm.size)
        self._mesh = None if comm.rank in self._spares else Mesh(comm, plan.shape)
        self._given: Given | None = None
        self._result: Any = None
        self.extents: dict[str, Extent] = {"height": (0, 0), "width": (0, 0)}
        self.network_seconds = self.gather_seconds = 0.0

    def run(self, call: Call, run: Runner = on_shards) -> None:
        """Cut the arguments and run the network."""
        if self._mesh is None:
            return
        started, args, kwargs = time.perf_counter(), self._args, self._kwargs
        if self._comm.size > 1:
            self._given = Given(self._mesh, args, kwargs, self._plan.bounds)
            args, kwargs = self._given.args, self._given.kwargs
        self._result = run(self._mesh, call, args, kwargs)
        self.extents = extents(self._mesh, first_tensor(self._result))
        self.network_seconds = time.perf_counter() - started

    def gather(self) -> Any:
        """The result of the network, put together; what it has written into its arguments is written into these."""
        started = time.perf_counter()
        result, self._result = self._result, None
        if self._comm.size > 1:
            result = self._gathered(result)
        self.gather_seconds = time.perf_counter() - started
        return result

    def gather_part(self, part: Tensor | None) -> Tensor:
        """A part of the result, put together while the network runs; None on ranks that have no shard."""
        if self._comm.size > 1:
            return self._gathered(part, is_last=False)
        assert part is not None, "one rank has all"
        return part

    @outside_modes
    def _gathered(self, result: Any, is_last: bool = True) -> Any:
        comm, mesh, keep = self._comm, self._mesh, self._keep
        if mesh is None or self._given is None:
            result, written = _wait_for_result(comm, keep, self._args, self._kwargs)
        else:
            result = map_tensors(lambda t: _collect(mesh, t, keep), result)
            written = self._given.written() if is_last else {}
            check_whole(result)
            if self._spares:
                _share_result(comm, result, written, self._spares, keep)
        # What the un-parallel network would have written into its arguments; after a call that has gone well.
        theirs = tensors_in((self._args, self._kwargs)) if written else []
        for place, tensor in written.items():
            theirs[place].copy_(tensor)
        return result


def check_whole(result: Any) -> None:
    """Check that no shard is left in a result.

    Raises:
        NotExactError: something holds one that can't be put together.
    """
    for holder, tensor in hidden_tensors(result):
        if layout_of(tensor):
            raise NotExactError(f"the result holds a {holder}, in which shards can't be put together")


def _collect(mesh: Mesh, tensor: Tensor, keep: str) -> Tensor:
    """What this rank keeps of a tensor in a result: the whole, or its shard as an ordinary tensor."""
    if keep != "shard":
        return gather(mesh, tensor, first_only=keep == "first")
    layout = layout_of(tensor)
    return _unmarked(own(mesh, tensor, layout)[0]) if layout else tensor


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
    said, tensors = packed(result, written, keep) if comm.rank == 0 else (None, [])
    comm.all_gather_object(said)
    comm.exchange([(spare, tensor) for spare in spares for tensor in tensors], [])


def packed(result: Any, written: dict[int, Tensor], keep: str) -> tuple[bytes, list[Tensor]]:
    """What spare ranks are told of a result, and the tensors that follow.

    Raises:
        NotExactError: it can't be sent.
    """
    tensors: list[Tensor] = []

    def leave_slot(tensor: Tensor) -> Any:
        tensors.append(tensor.contiguous())
        return _slot_of(tensor)

    changes = map_tensors(leave_slot, written)
    skeleton = map_tensors(leave_slot if keep == "all" else _slot_of, result)
    try:
        said = pickle.dumps((changes, skeleton))
        pickle.loads(said)  # What fails here would fail there.
    except Exception as error:
        name = type(result).__name__
        raise NotExactError(f"a {name} can't be sent to ranks without a shard: {error}") from error
    return said, tensors


def _slot_of(tensor: Tensor) -> _Slot:
    return _Slot(tuple(tensor.shape), tensor.dtype)


def _wait_for_result(
    comm: Comm, keep: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[int, Tensor]]:  # fmt: skip
    """What `_share_result` tells: the result, and what was written into arguments."""
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
    return result, written
