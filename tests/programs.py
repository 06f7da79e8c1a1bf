"""Python programs as processes that part from a warm one: real processes, pipes and signals, without the imports.

    with Program([sys.executable, "-m", "halovae", "doctor"], stdout=PIPE, text=True) as process:
        output, _ = process.communicate()

A program that such a process starts parts from it in turn. What imports cost, and that `python -m halovae` starts at
all, is seen by the tests that start it by `subprocess` itself.
"""

from __future__ import annotations

import atexit
import inspect
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, reduction
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch

_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_ASKED = inspect.signature(subprocess.Popen._execute_child)
_STANDARD = {"p2cread": 0, "c2pwrite": 1, "errwrite": 2}


def parts() -> bool:
    """Whether processes can part: who has touched an accelerator can't, so where there is one they import."""
    return torch.accelerator.device_count() == 0


def warm_context(preload: str) -> BaseContext:
    """Of processes that part from one that has imported the module `preload`; one module for all of a program."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Its process does not search the paths of this one, and what it can't import it leaves out without a word.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return context


class _Parting(subprocess.Popen):
    """Popen in which something else than fork and exec makes the process."""

    def _execute_child(self, *given: Any) -> None:
        asked = _ASKED.bind(self, *given).arguments
        if not _is_python(asked["args"]):
            super()._execute_child(*given)
            return
        self._part(asked)
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in _PIPES))

    def _part(self, asked: dict[str, Any]) -> None:
        raise NotImplementedError


class Program(_Parting):
    """A program of Python that parts from the warm process; its arguments are those of Popen."""

    def _part(self, asked: dict[str, Any]) -> None:
        files = {place: _Sent(asked[name]) for name, place in _STANDARD.items() if asked[name] != -1}
        started = {name: asked[name] for name in ("preexec_fn", "start_new_session")}
        place = asked["cwd"] or os.getcwd(), dict(os.environ if asked["env"] is None else asked["env"])
        context: Any = warm_context("warm")
        self._process = context.Process(target=_begin, args=(list(asked["args"]), files, place, started), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    # The warm process is its parent, and tells how it has ended.

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self.returncode is None and self._child_created:
            self.returncode = self._process.exitcode
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if not flags & os.WNOHANG:
            self._process.join()
        code = self._process.exitcode
        return (0, 0) if code is None else (self.pid, -code if code < 0 else code << 8)


class _Forking(_Parting):
    """A program of Python that parts from this process."""

    def _part(self, asked: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for name, place in _STANDARD.items():
                if asked[name] != -1:
                    os.dup2(asked[name], place)
            _let_go(keep={0, 1, 2, *asked["pass_fds"]})
            _become(asked["env"], asked["cwd"], asked["preexec_fn"], asked["start_new_session"])
            _run(list(asked["args"]))
        finally:
            os._exit(1)


class _Sent:
    """A file that goes along to another process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(duplicate: Any) -> int:
    return duplicate.detach()


def _begin(words: list[str], files: dict[int, int], place: tuple[str, dict[str, str]], started: dict[str, Any]) -> None:
    for standard, descriptor in files.items():
        os.dup2(descriptor, standard)
        os.close(descriptor)
    folder, environment = place
    _become(environment, folder, **started)
    execs = subprocess.Popen
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("Popen") is execs:  # Torchrun has it by name.
            vars(module)["Popen"] = _Forking
    _run(words)


def _let_go(keep: set[int]) -> None:
    """Of all other files. Their numbers stay taken: objects that came along still hold them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep | {nothing} and os.path.exists(f"/proc/self/fd/{name}"):
            os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)


def _become(environment: Any, folder: Any, preexec_fn: Any, start_new_session: bool) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    if start_new_session:
        os.setsid()
    if preexec_fn is not None:
        preexec_fn()


def _is_python(words: Any) -> bool:
    return isinstance(words, (list, tuple)) and str(words[0]) == sys.executable


def _run(words: Sequence[Any]) -> NoReturn:
    """The program, and the end of the process as Python ends it."""
    code = 1
    try:
        code = _code_of(list(map(str, words[1:])))
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code_of(words: list[str]) -> int:
    if words[0] == "-u":
        words.pop(0)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # pyright: ignore
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
