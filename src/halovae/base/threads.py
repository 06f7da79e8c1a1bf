"""Attributes that are another one for the thread that asks for it: those beside it go on with what is set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halovae.base.forks import free_in_children

_lock = free_in_children(threading.Lock())
_MISSING = object()


class _ByThread:
    """What stands in an object's `__dict__` while threads have a value of their own.

    Args:
        own: what stood there before.
        otherwise: what the other threads get: the same, or what the class has where nothing stood there.
    """

    def __init__(self, own: Any, otherwise: Any) -> None:
        self.own, self._otherwise = own, otherwise
        self.here: dict[int, list[Any]] = {}

    def value(self) -> Any:
        values = self.here.get(threading.get_ident())
        return values[-1] if values else self._otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value()(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _same, (self._otherwise,)


class _Switch(_ByThread, int):
    """A switch: whoever asks whether it is on gets the answer for his thread."""

    def __new__(cls, own: Any, otherwise: Any) -> _Switch:
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


@contextmanager
def set_here(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, a switch or a method of an object is another one for this thread.

    Args:
        owner: the object.
        name: of the attribute.
        value: a bool, or a function.
    """
    attributes, thread = vars(owner), threading.get_ident()
    with _lock:
        shared = attributes.get(name, _MISSING)
        if not isinstance(shared, _ByThread):
            kind = _Switch if isinstance(value, bool) else _ByThread
            shared = kind(shared, getattr(owner, name))
            attributes[name] = shared
        shared.here.setdefault(thread, []).append(value)
    try:
        yield
    finally:
        with _lock:
            shared.here[thread].pop()
            if not shared.here[thread]:
                del shared.here[thread]
            # Who has set something else meanwhile meant that to stay.
            if not shared.here and attributes.get(name) is shared:
                del attributes[name]
                if shared.own is not _MISSING:
                    attributes[name] = shared.own


def here(value: Any) -> Any:
    """What an attribute is for this thread."""
    return value.value() if isinstance(value, _ByThread) else value
