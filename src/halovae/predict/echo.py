"""Network calls of one kind followed once: a VAE that walks through time or over tiles calls its network alike again.

What a call does to shapes, clock and memory is noted when it is followed, and repeated for the next ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.functions import outside_modes
from halovae.base.private_torch import number_of_storage, pytree, without_modes
from halovae.calls.record import NETWORKS, answering
from halovae.calls.state import ModuleState, refill
from halovae.exact.layout import layout_of, mark
from halovae.kernels import autocast
from halovae.kernels.kept import kept
from halovae.kernels.lazy.deferred import Deferred, recipe_of
from halovae.kernels.lazy.joined import Joined
from halovae.predict.meter import Meter, MeteredComm, Reading


@dataclass(frozen=True)
class _Kept:
    """A leaf that was there before the call."""

    place: int


@dataclass(frozen=True)
class _View:
    """A tensor, by where its memory is: that of a leaf before the call, or new memory of the call."""

    place: int | None
    memory: int
    """Number among the new ones."""
    size: int
    """Bytes of all of it."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    layout: Any


@dataclass(frozen=True)
class _Waiting:
    """A join that is still to be computed."""

    recipe: Joined
    """Without its parts."""
    parts: tuple[Any, ...]
    layout: Any


Tree = tuple[tuple[Any, ...], Any]
"""Leaves and their structure."""


@dataclass(frozen=True)
class _Effect:
    """What calls of one kind do."""

    result: Tree
    after: Tree
    """Arguments and what the modules keep."""
    cost: Reading


Effects = dict[Any, _Effect]
"""By kind."""


class _NotAgain(Exception):
    """A call that can't be repeated from what is known of it."""


@dataclass(frozen=True)
class _Given:
    """Memory that was there before the run."""

    address: int


class _Before:
    """The tensors that were there before a call, which may let go of them."""

    @outside_modes
    def __init__(self, leaves: list[Any], meter: Meter) -> None:
        self._meter = meter
        self._leaves: dict[int, tuple[int, weakref.ref[Tensor], bool]] = {}
        self._memories: dict[Any, int] = {}
        for place, leaf in enumerate(_expanded(leaves)):
            if isinstance(leaf, Tensor):
                self._leaves[id(leaf)] = place, weakref.ref(leaf), (waits := _join_in(leaf) is not None)
                if not waits:
                    self._memories.setdefault(self.memory_of(_plain(leaf)), place)

    def place_of(self, tensor: Tensor) -> int | None:
        """Which of them a tensor is.

        Raises:
            _NotAgain: the call has computed it.
        """
        place, known, waited = self._leaves.get(id(tensor), (None, None, False))
        if known is None or known() is not tensor:
            return None
        if waited and _join_in(tensor) is None:
            raise _NotAgain
        return place

    def owner_of(self, memory: Any) -> int | None:
        """Which of them has had this memory."""
        return self._memories.get(memory)

    def memory_of(self, tensor: Tensor) -> Any:
        number = self._meter.memory_of(tensor)
        return _Given(number_of_storage(tensor.untyped_storage())) if number is None else number


class _Echo:
    def __init__(self, network: nn.Module, meter: Meter, comm: MeteredComm, known: Effects) -> None:
        self._network, self._meter, self._comm, self._known = network, meter, comm, known
        self._state = ModuleState(network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, before, state = self._look(args, kwargs)
        if key is None or not self._comm.is_idle:
            return self._network(*args, **kwargs)
        if key in self._known:
            return self._repeat(self._known[key], args, kwargs, before, state)
        known, learned = _Before(before, self._meter), _learned()
        del before, state  # The network may let go of what is in them.
        with self._meter.reading(self._comm) as cost:
            result = self._network(*args, **kwargs)
        if _learned() == learned and self._comm.is_idle:
            self._note(key, known, result, args, kwargs, cost)
        return result

    @outside_modes
    def _look(self, args: Any, kwargs: Any) -> tuple[Any, list[Any], dict[Any, Any]]:
        """What tells calls apart, the leaves of arguments and state, and the state.

        The first is None where something among the arguments is still to be computed.
        """
        state = self._state.changed()
        before, structure = pytree.tree_flatten((args, kwargs, state))
        try:
            key = structure, tuple(map(_described, before)), _learned(), autocast.state()
            hash(key)
        except (_NotAgain, TypeError):
            key = None
        return key, before, state

    @outside_modes
    def _note(self, key: Any, before: _Before, result: Any, args: Any, kwargs: Any, cost: Reading) -> None:
        notes = _Notes(before)
        try:
            after = notes.tree((args, kwargs, self._state.changed()))
            self._known[key] = _Effect(notes.tree(result), after, cost)
        except _NotAgain:
            return

    @outside_modes
    def _repeat(self, effect: _Effect, args: Any, kwargs: Any, before: list[Any], state: dict[Any, Any]) -> Any:
        with without_modes():
            self._meter.add(effect.cost, self._comm)
            makes = _Makes(self._meter, before)
            new_args, new_kwargs, new_state = makes.tree(effect.after)
            refill((args, kwargs), (new_args, new_kwargs))
            if state or new_state:
                self._state.set(new_state)
            return makes.tree(effect.result)


class _Notes:
    """Describes what there is after a call, by what was there before."""

    def __init__(self, before: _Before) -> None:
        self._before = before
        self._new: dict[Any, int] = {}

    def tree(self, value: Any) -> Tree:
        leaves, structure = pytree.tree_flatten(value)
        return tuple(map(self._leaf, leaves)), structure

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if (place := self._before.place_of(leaf)) is not None:
            return _Kept(place)
        _check_marks(leaf)
        layout = layout_of(leaf)
        if (join := _join_in(leaf)) is not None:
            return _Waiting(replace(join, parts=()), tuple(map(self._leaf, join.parts)), layout)
        tensor = _plain(leaf)
        memory = self._before.memory_of(tensor)
        owner = self._before.owner_of(memory)
        if owner is None and isinstance(memory, _Given):
            raise _NotAgain  # of a weight
        number = -1 if owner is not None else self._new.setdefault(memory, len(self._new))
        return _View(
            owner, number, tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor.stride(),
            int(tensor.storage_offset()), tensor.dtype, layout,
        )  # fmt: skip


class _Makes:
    """Makes what is described; new memory is followed."""

    def __init__(self, meter: Meter, before: list[Any]) -> None:
        self._meter, self._before = meter, list(_expanded(before))
        self._new: dict[int, Any] = {}

    def tree(self, tree: Tree) -> Any:
        return pytree.tree_unflatten(list(map(self._leaf, tree[0])), tree[1])

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, _Kept):
            return self._before[leaf.place]
        if isinstance(leaf, _Waiting):
            return mark(Deferred(replace(leaf.recipe, parts=tuple(map(self._leaf, leaf.parts)))), leaf.layout)
        if not isinstance(leaf, _View):
            return leaf
        view = torch.empty(0, dtype=leaf.dtype, device="meta")
        view.set_(self._memory(leaf), leaf.offset, leaf.shape, leaf.stride)
        return mark(view, leaf.layout)

    def _memory(self, view: _View) -> Any:
        if view.place is not None:
            return _plain(self._before[view.place]).untyped_storage()
        if view.memory not in self._new:
            memory = torch.empty(view.size, dtype=torch.uint8, device="meta")
            self._meter.follow(memory)
            self._new[view.memory] = memory.untyped_storage()
        return self._new[view.memory]


@contextmanager
def echoing(vae: nn.Module, half: str, meter: Meter, comm: MeteredComm, known: Effects) -> Iterator[None]:
    """Within it, the VAE's network is followed once for calls of each kind.

    Args:
        vae: the VAE.
        half: "encode" or "decode".
        meter: whose clock and memory are to be right.
        comm: the group on paper.
        known: what calls did, for runs in which calls of one kind do the same.
    """
    network = getattr(vae, NETWORKS[half], None)
    if not isinstance(network, nn.Module):
        yield
        return
    with answering(vae, half, _Echo(network, meter, comm, known)):
        yield


def _learned() -> Any:
    """What kernels have found out that tells how the next call runs."""
    return frozenset(kept().rooms.items())


def _described(leaf: Any) -> Any:
    """What tells a leaf from others.

    Raises:
        _NotAgain: it is still to be computed, and not by a mere join.
    """
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    _check_marks(leaf)
    if (join := _join_in(leaf)) is not None:
        return (
            join.dim,
            tuple(join.pads.items()),
            join.fill,
            (*join.beyond.items(),),
            tuple(map(_described, join.parts)),
            layout_of(leaf),
        )
    tensor = _plain(leaf)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, layout_of(leaf)


def _check_marks(tensor: Tensor) -> None:
    """Check that nothing is known of a tensor but what is repeated.

    Raises:
        _NotAgain: there is.
    """
    own = 2 if isinstance(tensor, Deferred) else 0
    if len(vars(tensor)) > own + (layout_of(tensor) is not None):
        raise _NotAgain


def _join_in(tensor: Tensor) -> Joined | None:
    """What waits in a tensor, where all of it is there already."""
    recipe = recipe_of(tensor)
    return recipe if isinstance(recipe, Joined) and recipe.halo is None else None


def _expanded(leaves: Iterable[Any]) -> Iterator[Any]:
    """The leaves, each with the parts of what waits in it."""
    for leaf in leaves:
        yield leaf
        if isinstance(leaf, Tensor) and (join := _join_in(leaf)) is not None:
            yield from _expanded(join.parts)


def _plain(tensor: Tensor) -> Tensor:
    """What has memory.

    Raises:
        _NotAgain: it is not computed yet.
    """
    if not isinstance(tensor, Deferred):
        return tensor
    if tensor.value is None:
        raise _NotAgain
    return _plain(tensor.value)
