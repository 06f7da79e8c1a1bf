"""Real gloo ranks for tests: processes that are started once and kept, and run functions of the test modules."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
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
    """

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank; the results in rank order. The function is found by its name."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        answers = [pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else (False, "no answer in time") for pipe in self._pipes]
        if not all(ok for ok, _ in answers):
            raise RanksFailed("\n".join(f"rank {i}: {value}" for i, (ok, value) in enumerate(answers) if not ok))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
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
