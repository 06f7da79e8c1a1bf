"""The command line for tests: in this process or in one of its own."""

from __future__ import annotations

import ctypes
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from families import FAMILIES
from programs import Program, parts
from ranks import Ranks, free_port

from halovae import comm
from halovae.cli.main import main

_PR_SET_PDEATHSIG = 1
PATIENCE = 300
"""Seconds until a command is taken for stuck: most of its time is spent importing, which a busy machine makes long."""


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in `folder`, as no rank of anything, with the threads of the other tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.chdir(folder)
    return folder


def saved(family: str, folder: Path) -> str:
    """A folder with a VAE so small that start-up is all that a run takes."""
    FAMILIES[family].build().save_pretrained(folder)
    return str(folder)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The program in a process of its own, which has imported all already."""
    return start_program([sys.executable, "-m", "halovae", *arguments], **options)


def start_program(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Any program of Python, likewise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return (Program if parts() else subprocess.Popen)(words, **options)


def end_with_parent() -> None:
    """For `preexec_fn`: the child is killed when the tests are, however they end. On Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of such a process."""
    return run_program([sys.executable, "-m", "halovae", *arguments])


def run_program(words: list[str]) -> tuple[int, str, str]:
    """Those of any program of Python, which has imported all already."""
    with start_program(words) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, output, errors


def on_ranks(ranks: Ranks, *arguments: str, program: Callable[[list[str]], int] = main) -> tuple[int, str, str]:
    """As `run` under torchrun, on ranks that have imported all already.

    Returns:
        The exit code, which is that of all ranks; standard output and standard error of the first one.
    """
    ports = free_port(), free_port()
    ended = ranks.run(_on_rank, Path.cwd(), ports, program, list(arguments))
    assert len({code for code, _, _ in ended}) == 1, ended
    return ended[0]


def _on_rank(
    rank: int, folder: Path, ports: tuple[int, int], program: Callable[[list[str]], int], arguments: list[str]
) -> tuple[int, str, str]:
    output, errors = io.StringIO(), io.StringIO()
    with _a_world_of_its_own(*ports), chdir(folder), redirect_stdout(output), redirect_stderr(errors):
        code = program(arguments)
    return code, output.getvalue(), errors.getvalue()


@contextmanager
def _a_world_of_its_own(port: int, next_port: int) -> Iterator[None]:
    """A program joins the world and leaves it, with as many threads as other tests; they find theirs after it."""
    comm.shutdown()
    try:
        with patch.dict(os.environ, MASTER_PORT=str(port)), patch.object(torch, "set_num_threads", lambda count: None):
            yield
    finally:
        comm.shutdown()  # A program that fails does not leave.
        with patch.dict(os.environ, MASTER_PORT=str(next_port)):
            comm.init_from_env("cpu")


def names(folder: Path) -> set[str]:
    """The files in a folder."""
    return {path.name for path in folder.iterdir()}


def read_terminal(descriptor: int, until: bytes | None = None) -> bytes:
    """What is written to a terminal until the pattern `until`, or until nobody can write to it any more."""
    shown, deadline = b"", time.monotonic() + PATIENCE
    while until is None or not re.search(until, shown):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, shown[-1000:]
        try:
            shown += os.read(descriptor, 4096)
        except OSError:  # The other end is closed.
            assert until is None, shown[-1000:]
            os.close(descriptor)
            break
    return shown


def interrupt(*arguments: str, until: bytes) -> bytes:
    """Start the program on two ranks, and press Ctrl-C as soon as its terminal shows the pattern `until`.

    Both ranks have to be gone within 5 seconds, and the exit code has to say why.

    Returns:
        What the terminal had shown before.
    """
    ours, theirs = pty.openpty()
    process = start(*arguments, "--ranks", "2", stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    before = read_terminal(ours, until)
    pids = [rank.pid for rank in psutil.Process(process.pid).children()]
    assert len(pids) == 2
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    after = read_terminal(ours)
    process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert after.endswith(b"halovae: interrupted\r\n")
    assert b"Traceback" not in after
    assert not any(psutil.pid_exists(pid) for pid in pids)
    return before
