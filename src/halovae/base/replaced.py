"""An attribute of an object is another one for a while: for all threads, or for the one that asks for it alone.

Replacements of one attribute may end in any order; the last one that has not ended counts. What somebody else sets
meanwhile was meant to stay.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from halovae.base.forks import free_in_children

_lock = free_in_children(threading.Lock())
_MISSING = object()


@dataclass(eq=False)
class _Layer:
    value: Any
    thread: int | None
    """None: all."""


class _Stack:
    """The replacements of one attribute.

    Attributes:
        shown: what stands in the object's `__dict__` now.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.shown = self._own = vars(owner).get(name, _MISSING)
        self._unreplaced = getattr(owner, name, None)  # of the class, where the object has nothing
        self._name = name
        self.layers: list[_Layer] = []

    def value(self) -> Any:
        """What the attribute is for this thread."""
        here = threading.get_ident()
        found = (layer.value for layer in reversed(self.layers) if layer.thread in (None, here))
        return next(found, self._unreplaced)

    def stands_in(self, owner: Any) -> bool:
        return vars(owner).get(self._name, _MISSING) is self.shown

    def show(self, owner: Any) -> None:
        self.shown = self._own
        if self.layers:
            last = self.layers[-1].value
            same = all(layer.thread is None for layer in self.layers)
            self.shown = last if same else (_Switch if isinstance(last, bool) else _ByThread)(self, self._unreplaced)
        if self.shown is _MISSING:
            vars(owner).pop(self._name, None)
        else:
            vars(owner)[self._name] = self.shown


class _ByThread:
    """What stands in an object's `__dict__` while a thread has a value of its own."""

    def __init__(self, stack: _Stack, otherwise: Any) -> None:
        self._stack, self._otherwise = stack, otherwise

    def value(self) -> Any:
        return self._stack.value()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value()(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _same, (self._otherwise,)


class _Switch(_ByThread, int):
    """A switch: whoever asks whether it is on gets the answer for his thread."""

    def __new__(cls, stack: _Stack, otherwise: Any) -> _Switch:
        return int.__new__(cls, bool(otherwise))

    def __bool__(self) -> bool:
        return bool(self.value())

    def __eq__(self, other: object) -> bool:
        return self.value() == other

    def __hash__(self) -> int:
        return hash(self.value())

    def __repr__(self) -> str:
        return repr(self.value())


def _same(value: Any) -> Any:
    return value


_stacks: WeakKeyDictionary[Any, dict[str, _Stack]] = WeakKeyDictionary()


@contextmanager
def replaced(owner: Any, name: str, value: Any, *, here: bool = False) -> Iterator[None]:
    """Within it, an attribute of an object is another one.

    Args:
        here: for this thread alone; the value is a bool or a function.
    """
    layer = _Layer(value, threading.get_ident() if here else None)
    with _lock:
        stacks = _stacks.setdefault(owner, {})
        if name not in stacks or not stacks[name].stands_in(owner):
            stacks[name] = _Stack(owner, name)
        stack = stacks[name]
        stack.layers.append(layer)
        stack.show(owner)
    try:
        yield
    finally:
        with _lock:
            is_ours = stack.stands_in(owner)
            stack.layers.remove(layer)
            if is_ours:
                stack.show(owner)
            if not stack.layers and stacks.get(name) is stack:
                del stacks[name]


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Within it, calls of a method go to `around`, which gets the method itself and then their arguments."""
    original = getattr(owner, name)
    with replaced(owner, name, functools.update_wrapper(functools.partial(around, original), original)):
        yield


def value_here(value: Any) -> Any:
    """What an attribute that has this value is for this thread."""
    return value.value() if isinstance(value, _ByThread) else value
