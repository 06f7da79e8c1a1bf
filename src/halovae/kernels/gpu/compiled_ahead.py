"""Kernels compiled side by side, before they are launched.

Triton compiles a kernel when it is launched for the first time, in the thread that launches it. A first call of a VAE
launches dozens of kinds, and all other cores of the host would wait meanwhile. Most of a compilation is done without
Python's lock, so threads are enough. Where one fails, the kernel is compiled when it is launched.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from threading import Lock
from typing import Any

import torch

_MARK = "halovae"
"""File in a folder of Triton's cache."""

_MOST = 8
"""Threads: with more of them the one that goes on meanwhile hardly gets Python's lock."""

_launcher: defaultdict[Any, Lock] = defaultdict(Lock)
_noted: ContextVar[dict[Any, tuple[Any, str]] | None] = ContextVar("_noted", default=None)
_at_work: set[Future[None]] = set()


def is_possible() -> bool:
    """Whether this Triton compiles in threads: from 3.4 on it does so itself, where it is asked to."""
    return hasattr(import_module("triton"), "AsyncCompileMode")


@contextmanager
def compiled_ahead(device: torch.device, threads: int, name: str) -> Iterator[None]:
    """Within it, this thread launches no kernel that is not compiled yet, so that what it computes is of no use.

    At its end, other threads begin to compile the kernels that were to be launched: `wait` for them.

    Args:
        name: of the kind of call that has these kernels, in hexadecimal digits.
    """
    _take_note()
    noted: dict[Any, tuple[Any, str]] = {}
    token = _noted.set(noted)
    try:
        yield
    finally:
        _noted.reset(token)
    # What takes longest begins first.
    jobs = sorted(noted.values(), key=lambda job: -len(job[0].src))
    set_device = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(min(threads, _MOST), "halovae compiles", set_device)
    made = [pool.submit(_compile, kernel, data) for kernel, data in jobs]
    _at_work.update(made, [pool.submit(_mark, name)])
    pool.shutdown(wait=False)


@functools.cache
def _take_note() -> None:
    """Have Triton ask before it compiles: for the rest of the process, since other threads ask as well."""
    knobs = import_module("triton").knobs
    before = knobs.runtime.jit_cache_hook

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **others: Any) -> Any:
        noted = _noted.get()
        if noted is None or not fn.module.startswith(f"{__package__}."):
            return before and before(key=key, fn=fn, compile=compile, **others)
        noted[fn.module, fn.name, key] = fn.jit_function, compile["specialization_data"]
        return True  # It is neither compiled nor launched.

    knobs.runtime.jit_cache_hook = note


def _compile(kernel: Any, data: str) -> None:
    compiled = kernel.preload(data)
    with _launcher[kernel]:
        _ = compiled.run  # The program in C that launches it is compiled when it is asked for; most have the same one.


def _mark(name: str) -> None:
    _folder(name).put("", _MARK, binary=False)


def wait() -> None:
    """Until the kernels are compiled, or have failed to be: whoever launches those will see."""
    while _at_work:
        future = next(iter(_at_work), None)
        if future is not None:
            future.exception()
            _at_work.discard(future)


def are_compiled(name: str) -> bool:
    """Whether the kernels of a kind of call were compiled before: said in Triton's cache, so that it goes with them."""
    return _folder(name).get_file(_MARK) is not None


def _folder(name: str) -> Any:
    return import_module("triton.runtime.cache").get_cache_manager(name)
