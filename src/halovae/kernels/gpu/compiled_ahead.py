"""Kernels compiled side by side by other processes, before they are launched.

Triton compiles a kernel when it is launched for the first time, in the thread that launches it. A first call of a VAE
launches dozens of kinds, and all other cores of the host would wait meanwhile.

The processes have nothing of the one that starts them: no device, no torch, no memory. What they do is to fill Triton's
cache on disk. Where that fails, kernels are compiled when they are launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

from halovae.base.forks import free_in_children

Job = tuple[str, str, str]
"""Module and name of a kernel, and what Triton compiles it for: types, constants, what is known of numbers."""

_PATIENCE = 120.0
"""Seconds after which nobody waits for the processes any more: many times what all kernels of a call take."""

_MOST = 256
"""Kernels at the most; a network has some dozens."""

_MARK = "halovae"
"""File in a folder of Triton's cache."""

_noted: ContextVar[dict[Any, Job] | None] = ContextVar("_noted", default=None)
_one_at_a_time = free_in_children(threading.Lock())
_at_work: set[subprocess.Popen[bytes]] = set()


@contextmanager
def compiled_ahead(workers: int, name: str) -> Iterator[None]:
    """Within it, this thread launches no kernel that is not compiled yet, so that what it computes is of no use.

    At its end, others begin to compile the kernels that were to be launched: `wait` for them.

    Args:
        workers: processes at the most.
        name: of the kind of call that has these kernels, in hexadecimal digits.
    """
    knobs = import_module("triton").knobs
    with _one_at_a_time, _compilers(workers, knobs.cache.dir) as jobs:
        before = knobs.runtime.jit_cache_hook

        def note(*, key: Any, fn: Any, compile: dict[str, Any], **others: Any) -> Any:
            noted = _noted.get()
            if noted is None or not fn.module.startswith(f"{__package__}."):
                return before and before(key=key, fn=fn, compile=compile, **others)
            noted[fn.module, fn.name, key] = fn.module, fn.name, compile["specialization_data"]
            return True  # It is neither compiled nor launched.

        knobs.runtime.jit_cache_hook = note
        token = _noted.set({})
        try:
            yield
        finally:
            noted = _noted.get() or {}
            _noted.reset(token)
            knobs.runtime.jit_cache_hook = before
        driver = import_module("triton.runtime.driver").driver.active
        target, launcher = driver.get_current_target(), driver.launcher_cls
        device = [target.backend, target.arch, target.warp_size], [launcher.__module__, launcher.__qualname__]
        jobs += [name, *device, list(noted.values())]


@contextmanager
def _compilers(workers: int, folder: str) -> Iterator[list[Any]]:
    """Processes that get ready meanwhile; at the end they begin with what is in the list."""
    if getattr(sys, "frozen", False):  # The program is no interpreter.
        raise RuntimeError("there is no interpreter to start")
    path = [place for place in sys.path if isinstance(place, str)]  # pyright: ignore[reportUnnecessaryIsInstance]
    code = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve; serve({workers})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"TRITON_CACHE_DIR": folder},
    )  # fmt: skip
    _at_work.add(process)
    try:
        jobs: list[Any] = []
        yield jobs
        with process.stdin as pipe:  # pyright: ignore[reportOptionalContextManager]
            pipe.write(json.dumps(jobs).encode())
    except BaseException:
        process.kill()
        raise


def wait() -> None:
    """Until the kernels are on disk, where Triton finds them."""
    for process in tuple(_at_work):
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        process.kill()
        _at_work.discard(process)


def are_compiled(name: str) -> bool:
    """Whether the kernels of a kind of call were compiled before: said in Triton's cache, so that it goes with them."""
    return _folder(name).get_file(_MARK) is not None


def _folder(name: str) -> Any:
    return import_module("triton.runtime.cache").get_cache_manager(name)


# ---- in the other processes ------------------------------------------------------------------------------------------


class _Described:
    """Stands for the driver of a device that this process has nothing to do with."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0


def serve(workers: int) -> None:
    """Compile what the parent says, in children that each take the next kernel."""
    _end_with_parent()
    sys.modules["torch"] = ModuleType("torch")  # It takes seconds to load, and only who launches kernels uses it.
    import_module("triton.runtime.cache").triton_key()  # It reads all of Triton's library: once, for all children.
    call, target, (place, name), jobs = json.load(sys.stdin)
    device = _Described(import_module("triton.backends.compiler").GPUTarget(*target))
    import_module("triton.runtime.driver").driver.set_active(device)
    kernels = [(getattr(import_module(module), kernel), data) for module, kernel, data in jobs]
    kernels.sort(key=lambda kernel: -len(kernel[0].src))  # What takes longest begins first.
    launcher = getattr(import_module(place), name)

    def make(number: int) -> None:
        kernel, data = kernels[number]
        compiled = kernel.preload(data)
        # What passes arguments on to it is a program in C, which takes as long again.
        launcher(compiled.src, compiled.metadata)

    _share(make, len(kernels[:_MOST]), min(workers, len(kernels)))
    _folder(call).put("", _MARK, binary=False)


def _share(make: Callable[[int], None], count: int, workers: int) -> None:
    """Make things of so many numbers in children, each of which takes the next number."""
    turns, numbers = os.pipe()
    os.write(numbers, bytes(range(count)))
    os.close(numbers)
    children: list[int] = []
    for _ in range(workers):
        child = os.fork()
        if not child:
            _end_with_parent()
            while number := os.read(turns, 1):
                with suppress(Exception):  # Whoever launches it will see.
                    make(number[0])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _end_with_parent() -> None:
    with suppress(Exception):  # Elsewhere than on Linux they end when they are done, in seconds.
        import ctypes
        import signal

        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
