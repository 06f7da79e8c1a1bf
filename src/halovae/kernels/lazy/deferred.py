"""Tensors whose computation waits for their consumer, so that several passes over memory become one.

A `Deferred` has the shape and dtype of a result, and a recipe instead of memory. A kernel that understands the recipe
uses it; for everything else the result is computed when it is first needed, and kept.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from halovae.base.private_torch import no_functions, wrapper
from halovae.kernels.autocast import is_on, off
from halovae.kernels.memory_format import is_channels_last, memory_of, strides_of


class Recipe(Protocol):
    """How to make a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def channels_last(self) -> bool: ...

    def compute(self) -> Tensor:
        """The tensor. Called once at most."""
        ...

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The tensors it reads; they must not change before it is computed."""
        ...


class OfBase:
    """What a recipe has from the tensor, or from the recipe, that it begins with."""

    base: Any

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.base) if isinstance(self.base, Tensor) else self.base.channels_last

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return (self.base,) if isinstance(self.base, Tensor) else self.base.sources


class Deferred(torch.Tensor):
    """A tensor that is computed when it is needed. Reading it outside the fast mode computes it as well."""

    recipe: Recipe | None
    value: Tensor | None

    @staticmethod
    def __new__(cls: type[Deferred], recipe: Recipe) -> Deferred:
        self = wrapper(
            cls,
            recipe.shape,
            strides=strides_of(recipe.shape, recipe.channels_last),
            dtype=recipe.dtype,
            device=recipe.device,
        )
        self.recipe, self.value = recipe, None
        _here.pending[id(self)] = self
        return self

    def computed(self) -> Tensor:
        """The ordinary tensor."""
        if self.value is None:
            assert self.recipe is not None
            _here.pending.pop(id(self), None)
            with off() if is_on() else nullcontext():
                self.value = self.recipe.compute()
            self.recipe = None
        return self.value

    def fulfil(self, value: Tensor) -> None:
        """Take what another recipe has computed on its way."""
        _here.pending.pop(id(self), None)
        self.value, self.recipe = value, None

    __torch_function__ = no_functions

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*computed(args), **computed(kwargs or {}))


class _Here(threading.local):
    """What waits in this thread: others may be computing what waits in theirs."""

    def __init__(self) -> None:
        self.pending: WeakValueDictionary[int, Deferred] = WeakValueDictionary()


_here = _Here()


_NOT_PLAIN = (Deferred, tuple, list, dict)


def computed(value: Any) -> Any:
    """The arguments of a torch function with every deferred tensor among them computed."""
    if isinstance(value, Deferred):
        return value.computed()
    # By hand: torch's general walk through structures takes longer than many an operator.
    if isinstance(value, dict):
        return {name: computed(item) for name, item in value.items()} if value else value
    if not isinstance(value, (tuple, list)):
        return value
    for item in value:
        if isinstance(item, _NOT_PLAIN):
            break
    else:
        return value
    items = [computed(item) for item in value]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def recipe_of(tensor: Any) -> Recipe | None:
    """The recipe of a tensor that is not computed yet, else None."""
    return tensor.recipe if isinstance(tensor, Deferred) else None


def plain(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own."""
    return tensor.computed() if isinstance(tensor, Deferred) else tensor


def any_pending() -> bool:
    """Whether something is not computed yet that somebody holds on to."""
    return bool(_here.pending)


def settle(written: Tensor) -> None:
    """Compute what reads the memory of a tensor that is about to be written."""
    memory = memory_of(written)
    for deferred in list(_here.pending.values()):
        if deferred.recipe and any(memory_of(source) == memory for source in deferred.recipe.sources):
            deferred.computed()
