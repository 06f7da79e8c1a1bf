"""Network calls of one kind followed once: a VAE that walks through time or over tiles calls its network alike again.

What a call does to shapes, clock and memory is noted when it is followed, and repeated for the next ones. One in which
kernels keep something of the weights is not noted, since the next one finds that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
class _View:
    """A tensor after a call, by where its memory is."""

    memory: int
    """The place of the leaf before the call that has the same one; below 0 the number of a new one."""
    size: int
    """Bytes of all of it."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
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


class _Echo:
    def __init__(self, network: nn.Module, meter: Meter, comm: MeteredComm, known: Effects) -> None:
        self._network, self._meter, self._comm, self._known = network, meter, comm, known
        self._state = ModuleState(network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, before = self._look(args, kwargs)
        if key is None or not self._comm.is_idle:
            return self._network(*args, **kwargs)
        if key in self._known:
            return self._repeat(self._known[key], args, kwargs, before)
        places, kept_before = self._places(before), _kept()
        del before  # The network may let go of what is in it.
        with self._meter.reading(self._comm) as cost:
            result = self._network(*args, **kwargs)
        if _kept() == kept_before and self._comm.is_idle:
            self._note(key, places, result, args, kwargs, cost)
        return result

    @outside_modes
    def _look(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """What tells calls apart, and the leaves of arguments and state.

        The first is None where something among the arguments is still to be computed.
        """
        try:
            before, structure = _taken_apart((args, kwargs, self._state.changed()))
            key = structure, tuple(map(_described, before)), _kept()[0], autocast.state()
            hash(key)
        except (_NotAgain, TypeError):
            return None, []
        return key, before

    @outside_modes
    def _places(self, before: list[Any]) -> dict[int, int]:
        """The first of these leaves in each memory."""
        tensors = [(place, leaf) for place, leaf in enumerate(before) if isinstance(leaf, Tensor)]
        return {self._memory_of(_plain(leaf)): place for place, leaf in reversed(tensors)}

    def _memory_of(self, tensor: Tensor) -> int:
        """A number for its memory, below 0 for what was there before the run."""
        number = self._meter.memory_of(tensor)
        return -number_of_storage(tensor.untyped_storage()) if number is None else number

    @outside_modes
    def _note(self, key: Any, places: dict[int, int], result: Any, args: Any, kwargs: Any, cost: Reading) -> None:
        new: dict[int, int] = {}

        def view(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            _check_marks(leaf)
            tensor = _plain(leaf)
            memory = self._memory_of(tensor)
            if (place := places.get(memory)) is None:
                if memory < 0:
                    raise _NotAgain  # of a weight
                place = new.setdefault(memory, -1 - len(new))
            return _View(
                place, tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor.stride(),
                int(tensor.storage_offset()), tensor.dtype, layout_of(leaf),
            )  # fmt: skip

        try:
            trees = map(_taken_apart, (result, (args, kwargs, self._state.changed())))
            noted, after = ((tuple(map(view, leaves)), structure) for leaves, structure in trees)
            self._known[key] = _Effect(noted, after, cost)
        except _NotAgain:
            return

    @outside_modes
    def _repeat(self, effect: _Effect, args: Any, kwargs: Any, before: list[Any]) -> Any:
        new: dict[int, Any] = {}

        def memory(view: _View) -> Any:
            if view.memory >= 0:
                return _plain(before[view.memory]).untyped_storage()
            if view.memory not in new:
                tensor = torch.empty(view.size, dtype=torch.uint8, device="meta")
                self._meter.follow(tensor)
                new[view.memory] = tensor.untyped_storage()
            return new[view.memory]

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, _View):
                return leaf
            tensor = torch.empty(0, dtype=leaf.dtype, device="meta")
            return mark(tensor.set_(memory(leaf), leaf.offset, leaf.shape, leaf.stride), leaf.layout)

        with without_modes():
            self._meter.add(effect.cost, self._comm)
            after, result = (pytree.tree_unflatten(list(map(made, leaves)), structure) for leaves, structure in (
                effect.after, effect.result))  # fmt: skip
            new_args, new_kwargs, new_state = after
            refill((args, kwargs), (new_args, new_kwargs))
            self._state.set(new_state)
            return result


@contextmanager
def echoing(vae: nn.Module, half: str, meter: Meter, comm: MeteredComm, known: Effects) -> Iterator[None]:
    """Within it, the VAE's network is followed once for calls of each kind.

    Args:
        meter: whose clock and memory are to be right.
        known: what calls did, for runs in which calls of one kind do the same.
    """
    network = getattr(vae, NETWORKS[half], None)
    if not isinstance(network, nn.Module):
        yield
        return
    with answering(vae, half, _Echo(network, meter, comm, known)):
        yield


def _kept() -> tuple[Any, int]:
    """What kernels have found out that tells how the next call runs, and how much they have made of weights."""
    return frozenset(kept().rooms.items()), sum(len(made.by_kind) for made in kept().weights.values())


class _Waiting:
    """A join that is still to be computed, as a node of a tree: its parts are the leaves."""

    def __init__(self, join: Joined, layout: Any) -> None:
        self.parts = list(join.parts)
        self.words = join.dim, (*join.pads.items(),), join.fill, (*join.beyond.items(),), layout


def _join_again(parts: Any, words: Any) -> Tensor:
    dim, pads, fill, beyond, layout = words
    return mark(Deferred(Joined(tuple(parts), dim, dict(pads), fill, dict(beyond))), layout)


pytree.register_pytree_node(_Waiting, lambda waiting: (waiting.parts, waiting.words), _join_again)


def _taken_apart(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, joins that wait taken apart too."""
    return pytree.tree_flatten(pytree.tree_map_only(Deferred, _opened, value))


def _opened(tensor: Deferred) -> Any:
    recipe = recipe_of(tensor)
    if not isinstance(recipe, Joined) or recipe.halo:
        return tensor
    _check_marks(tensor)
    return _Waiting(recipe, layout_of(tensor))


def _described(leaf: Any) -> Any:
    """What tells a leaf from others."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    _check_marks(leaf)
    tensor = _plain(leaf)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, layout_of(leaf)


def _check_marks(tensor: Tensor) -> None:
    """Check that nothing is known of a tensor but what is repeated."""
    own = 2 if isinstance(tensor, Deferred) else 0
    if len(vars(tensor)) > own + (layout_of(tensor) is not None):
        raise _NotAgain


def _plain(tensor: Tensor) -> Tensor:
    """What has memory."""
    if not isinstance(tensor, Deferred):
        return tensor
    if tensor.value is None:
        raise _NotAgain
    return _plain(tensor.value)
