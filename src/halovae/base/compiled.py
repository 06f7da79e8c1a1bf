"""Networks that torch.compile has been told to compile: they run as they are written while they run on shards.

A compiler can't look into function modes. Where it tries and fails, it leaves torch in disorder for every later call.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halovae.base.forks import free_in_children
from halovae.base.private_torch import hide_function, is_compiled_function, is_given_to_compiler

_lock = free_in_children(threading.Lock())
_running = 0
_stance: Any = None


@contextmanager
def as_written() -> Iterator[None]:
    """Within it, whatever is compiled runs as its Python code says; in other threads too, since torch knows no better.

    May be entered by several threads at once; the last one to leave puts back what was set.
    """
    global _running, _stance
    with _lock:
        if not _running:
            _stance = torch.compiler.set_stance("force_eager")
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                _stance.__exit__(None, None, None)


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which a compiler that is told to compile it, or what calls it, leaves as it is."""
    call: Any = torch.compiler.disable(function)
    hide_function(call)
    return call


def is_compiled(modules: Iterable[nn.Module], *functions: Callable[..., Any]) -> bool:
    """Whether modules of a network, functions, or what is next to the code of the modules is given to torch.compile."""
    if "torch._dynamo" not in sys.modules:
        return False
    kinds: set[type] = set()
    for module in modules:
        if is_given_to_compiler(module):
            return True
        kinds.add(type(module))
    return any(map(_is_wrapped, functions)) or _has_compiled_code(frozenset(kinds))


@functools.lru_cache(maxsize=64)
def _has_compiled_code(kinds: frozenset[type]) -> bool:
    """Whether methods of these classes, or functions in their files, have been given to torch.compile."""
    classes = {base for kind in kinds for base in kind.__mro__ if not base.__module__.startswith("torch.")}
    files = (sys.modules.get(name) for name in {kind.__module__ for kind in classes})
    places = [vars(place) for place in (*classes, *filter(None, files))]
    return any(_is_wrapped(value) for place in places for value in list(place.values()))


def _is_wrapped(value: Any) -> bool:
    try:
        return is_compiled_function(value)
    except Exception:  # Whatever a stranger's attributes raise.
        return False
