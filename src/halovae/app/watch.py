"""A process that ends in time: on a signal, or when the launcher that started it is gone.

A rank spends most of its time inside native code (a convolution, a wait for a neighbour), where Python runs no signal
handlers. A thread sees to it that the process is gone within `GRACE` seconds all the same, and leaves no half-written
file. The same thread watches a pipe whose other end only the launcher holds: its end of file means that the launcher
has died, however it died.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import NoReturn

from halovae.base.errors import HalovaeError, InputError, NotExactError, RankFailedError
from halovae.base.files import remove_partial
from halovae.base.forks import owned_here

GRACE = 2.0
"""Seconds between a signal and the end of the process, unless it needs more."""
REPORT_FD = "HALOVAE_REPORT_FD"
"""Environment: file descriptor of the pipe on which a rank tells the launcher why it failed."""
LAUNCHER_FD = "HALOVAE_LAUNCHER_FD"
"""Environment: file descriptor of the pipe that ends with the launcher."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP has come."""

    def __init__(self, signum: int, then: str = "") -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code, self.then = 128 + signum, then


def interruption(then: str = "") -> str:
    """The line that tells a user of it, and what to do next. A rank has none: who started it says it, once for all."""
    return "" if "RANK" in os.environ else f"halovae: interrupted{then and '; '}{then}\n"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ends, as it travels from the rank to the launcher."""

    message: str
    exit_code: int
    expected: bool
    """Whether it is an error of halovae's own, whose message says it all."""
    consequence: bool
    """Whether another rank is to blame."""
    details: str
    """The traceback."""
    time: float
    """Seconds since the epoch: the first of several failures is the cause."""


def failure_of(error: BaseException) -> Failure:
    """Describe an exception: exit code 2 for what the caller can put right, 1 for everything else."""
    expected = isinstance(error, HalovaeError)
    consequence = isinstance(error, RankFailedError)
    refused = isinstance(error, (InputError, NotExactError))
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    # Each fault of bad input has a line of its own.
    message = ("\n" if refused else " ").join(filter(None, lines))
    message = message if expected else f"{type(error).__name__}: {message}"
    return Failure(
        message=message,
        exit_code=2 if refused else 1,
        expected=expected,
        consequence=consequence,
        details="".join(traceback.format_exception(error)),
        time=time.time(),
    )


def report(failure: Failure) -> bool:
    """Tell the launcher. False when there is none: then this process has to speak for itself."""
    if REPORT_FD not in os.environ:
        return False
    with suppress(OSError), os.fdopen(int(os.environ[REPORT_FD]), "w") as pipe:
        json.dump(asdict(failure), pipe)
    return True


def end_on_ctrl_c() -> None:
    """From here on, and wherever nothing else is asked for, Ctrl-C ends this process at once. A library that is being
    imported may swallow a KeyboardInterrupt, and go on half imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Who ignores it was told to.
        signal.signal(signal.SIGINT, lambda signum, frame: _end(signum, ""))


def _end(signum: int, then: str) -> NoReturn:
    remove_partial()
    restore_terminal()
    os.write(2, interruption(then).encode())
    os._exit(128 + signum)


@contextmanager
def guarded(then: str = "", grace: float | None = None) -> Iterator[None]:
    """Within it, the first signal raises `Interrupted` in the main thread, and the process is gone `grace` (`GRACE`)
    seconds later at the latest. So does the end of the launcher. `then` is what a user can do after it, for the line
    that tells."""
    guard = _Guard(then, GRACE if grace is None else grace)
    try:
        yield
    finally:
        guard.end()


class _Guard:
    """Handlers of signals, and the thread that ends the process where they are of no use."""

    def __init__(self, then: str, grace: float) -> None:
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)
        self._over, self._inherited = threading.Event(), False

        def interrupt(signum: int, frame: FrameType | None) -> None:
            # A second Ctrl-C must not interrupt the clean-up that the first one began.
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_IGN)
            raise Interrupted(signum, then)

        self._handlers = {signum: signal.signal(signum, interrupt) for signum in _SIGNALS}
        # Written by the C handler at once, also while the main thread is in native code.
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        arguments = self._wakeup_read, self._over, then, grace
        self._thread = threading.Thread(target=_watch, args=arguments, name="halovae-watch", daemon=True)
        self._thread.start()
        owned_here(self, _Guard._disown)

    def end(self) -> None:
        if self._inherited:
            return
        self._over.set()
        self._unhandle()
        with suppress(BlockingIOError):  # Then there is enough to read.
            os.write(self._wakeup_write, bytes(1))  # Its end would tell nothing while something else holds it open.
        self._thread.join()
        os.close(self._wakeup_write)
        os.close(self._wakeup_read)

    def _unhandle(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _disown(self) -> None:
        """In a forked child: its signals are not its parent's, and it does not speak for it to the launcher."""
        if self._inherited:
            return
        self._inherited = True
        self._unhandle()
        os.close(self._wakeup_write)
        os.close(self._wakeup_read)
        for name in (LAUNCHER_FD, REPORT_FD):
            if name in os.environ:
                os.close(int(os.environ.pop(name)))


def restore_terminal() -> None:
    """Clear the line and show the cursor: a progress bar that was cut off has hidden it."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\r\x1b[K\x1b[?25h")


def _watch(wakeup: int, over: threading.Event, then: str, grace: float) -> None:
    launcher = int(os.environ.get(LAUNCHER_FD, "-1"))
    sources = [wakeup] if launcher < 0 else [wakeup, launcher]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if launcher in ready:
            sources.remove(launcher)
            os.kill(os.getpid(), signal.SIGTERM)
            continue
        received = os.read(wakeup, 1)
        if over.is_set():
            return
        if received[0] not in _SIGNALS:
            continue
        if not over.wait(grace):
            _end(received[0], then)
        return
