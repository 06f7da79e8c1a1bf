"""Real gloo ranks for tests: processes that are started once and kept, and run functions of the test modules."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 240


class RanksFailed(AssertionError):
    """Some ranks raised; carries every rank's traceback."""


class Ranks:
    """`size` processes in one gloo world.

    Args:
        size: number of ranks.
        preload: modules that all ranks of this program need, imported once: makes ranks that soon end cheap.
    """

    def __init__(self, size: int, preload: Sequence[str] = ()) -> None:
        self.size = size
        context = mp.get_context("forkserver" if preload else "spawn")
        if preload:
            context.set_forkserver_preload(list(preload))
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()  # Else the end of the process would not end its pipe.
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank; the results in rank order. The function is found by its name."""
        self.begin(function, *args)
        answers = [self.answer(rank) for rank in range(self.size)]
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
            return pipe.recv() if pipe.poll(seconds) else (False, "no answer in time")
        except EOFError:
            return False, "its process has ended"

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def kill(self) -> None:
        """End the processes without a word."""
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from halovae import comm

    comm.init_from_env("cpu")
    while (task := pipe.recv()) is not None:
        module, name, args = task
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    comm.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
