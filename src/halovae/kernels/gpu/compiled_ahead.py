"""Kernels compiled side by side, before they are launched.

Triton compiles a kernel when it is launched for the first time, in the thread that launches it. A first call of a VAE
launches dozens of kinds, and all other cores of the host would wait meanwhile. Most of a compilation is done without
Python's lock, so threads are enough. Where one fails, the kernel is compiled when it is launched.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from threading import Lock
from typing import Any

import torch

_MARK = "halovae"
"""File in a folder of Triton's cache."""
_MOST = 8
"""Threads: with more of them the one that goes on meanwhile hardly gets Python's lock."""


@dataclass(eq=False)
class Compilation:
    """Kernels of one kind of call.

    Attributes:
        name: of that kind in hexadecimal digits, once all its kernels were asked for.
    """

    name: str = ""
    kernels: list[Future[None]] = field(default_factory=list[Future[None]])


_at_work: set[Compilation] = set()
_launcher: defaultdict[str, Lock] = defaultdict(Lock)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_at_work.clear)  # Its threads are not there.


def is_possible() -> bool:
    """Whether this Triton compiles in threads: from 3.4 on it does so itself, where it is asked to."""
    return hasattr(import_module("triton"), "AsyncCompileMode")


@contextmanager
def compiled_ahead(device: torch.device, threads: int) -> Iterator[Compilation]:
    """Within it, this thread launches no kernel that is not compiled yet, so that what it computes is of no use.

    At its end, other threads begin to compile the kernels that were to be launched: `wait` for them.
    """
    asked, compilations = Compilation(), dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]]()

    class Noted(import_module("triton").AsyncCompileMode):
        """Of the mode in which Triton compiles in threads, what asks for a kernel: it gets none."""

        def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
            compilations[key] = compile_fn, finalize_fn

    with Noted(None):
        yield asked
    set_device = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(min(threads, _MOST), "halovae compiles", set_device)
    asked.kernels += [pool.submit(_compile, *functions) for functions in compilations.values()]
    _at_work.add(asked)
    pool.shutdown(wait=False)


def _compile(compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
    kernel = compile_fn()
    finalize_fn(kernel)
    with _launcher[kernel.name]:
        _ = kernel.run  # The program in C that launches it is compiled when it is asked for; most have the same one.


def wait() -> None:
    """Until the kernels are compiled, or have failed to be: whoever launches those will see."""
    for asked in tuple(_at_work):
        failed = [kernel for kernel in asked.kernels if kernel.exception()]
        if asked.name and not failed:
            _folder(asked.name).put("", _MARK, binary=False)
        _at_work.discard(asked)


def are_compiled(name: str) -> bool:
    """Whether the kernels of a kind of call were compiled before: said in Triton's cache, so that it goes with them."""
    return _folder(name).get_file(_MARK) is not None


def _folder(name: str) -> Any:
    return import_module("triton.runtime.cache").get_cache_manager(name)
