"""Real ranks for tests: processes that are started once and kept, and run functions of the test modules."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp
from programs import parts, warm_context
from torch.overrides import _get_current_function_mode_stack

TIMEOUT_SECONDS = 240
NO_ANSWER = "no answer in time"
ENDED = "its process has ended"


class RanksFailed(AssertionError):
    """Some ranks raised; carries every rank's traceback."""


class Ranks:
    """`size` processes in one world: of gloo, or of what an accelerator has.

    They part from a process that has imported what ranks need, so they start in no time. Ranks that don't answer or
    have ended are replaced, so that what they were asked is not taken for an answer to another test.

    Args:
        size: number of ranks.
        preload: the module that has these imports. One for all ranks of a program.
        device: its kind; on an accelerator, each rank has its own and the default backend of it.
    """

    def __init__(self, size: int, preload: str = "warm", device: str = "cpu") -> None:
        self.size, self._device = size, device
        self._preload = preload if parts() else ""
        self._context: Any = warm_context(preload) if self._preload else mp.get_context("spawn")
        self._start()

    def _start(self) -> None:
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            given = rank, self.size, port, theirs, self._preload, self._device
            process = self._context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()  # Else the end of the process would not end its pipe.
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank; the results in rank order. The function is found by its name."""
        self.begin(function, *args)
        answers = [self.answer(rank) for rank in range(self.size)]
        if {NO_ANSWER, ENDED} & {value for ok, value in answers if not ok}:
            self.kill()
            self._start()
        if not all(ok for ok, _ in answers):
            raise RanksFailed("\n".join(f"rank {i}: {value}" for i, (ok, value) in enumerate(answers) if not ok))
        return [value for _, value in answers]

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """As `run`, without waiting."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))

    def answer(self, rank: int, seconds: float = TIMEOUT_SECONDS) -> tuple[bool, Any]:
        """Whether a rank's function has returned, and what; else the traceback, or why there is none."""
        pipe = self._pipes[rank]
        try:
            return pipe.recv() if pipe.poll(seconds) else (False, NO_ANSWER)
        except EOFError:
            return False, ENDED

    def says(self, rank: int) -> bool:
        """Whether `answer` would not wait."""
        return self._pipes[rank].poll()

    def processor_seconds(self) -> float:
        """Processor time that the ranks have taken, of those that are alive."""
        total = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                total += sum(psutil.Process(process.pid).cpu_times()[:2])
        return total

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def kill(self) -> None:
        """End the processes without a word."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()


def _serve(rank: int, size: int, port: int, pipe: Connection, preload: str, device: str) -> None:
    assert not preload or preload in sys.modules, f"{preload} was not imported before the ranks parted"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    from halovae import comm

    comm.init_from_env(device)
    while (task := pipe.recv()) is not None:
        module, name, args = task
        before = _settings()
        try:
            result = getattr(importlib.import_module(module), name)(rank, *args)
            # Libraries for accelerators set variables when they load.
            known = before if preload else _settings() | before
            left = {what: value for what, value in _settings().items() if value != known.get(what)}
            assert not left, f"{name} has left {left}"
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    comm.shutdown()


def _settings() -> dict[str, Any]:
    """What one test could leave behind for the next ones on the same ranks."""
    return {
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modes": len(_get_current_function_mode_stack()),
        "folder": os.getcwd(),
        **os.environ,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
