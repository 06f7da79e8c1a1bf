"""Start the ranks of one machine, and end them all when one of them fails or the user has had enough.

Each rank is this program again, with the same arguments and the environment variables of torchrun: under torchrun the
very same code runs.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from halovae.app.watch import LAUNCHER_FD, REPORT_FD, Failure, restore_terminal
from halovae.base.errors import InputError

PROGRAM = (sys.executable, "-m", "halovae")
RANKS_PER_CORE = 2
"""More processes than this on a core only wait for each other."""
_KILL_AFTER = 3.0
"""Seconds from asking a rank to end to ending it."""
_SETTLE = 2.0
"""Seconds that the others get, after one rank has failed, to fail with their own words."""
_TAIL = 40
"""Lines of a rank's standard error that are kept, to be shown when it dies without a word of its own."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks. All 0 and 1 when it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place() -> Place | None:
    """This process's place as the environment (of `run_ranks` or torchrun) says, None when it is no rank.

    Raises:
        InputError: the variables are there but hold no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    defaults = {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    try:
        return Place(*(int(os.environ.get(name, defaults.get(name, ""))) for name in names))
    except ValueError:
        held = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise InputError(f"the environment names a rank, but not with numbers: {held}") from None


def was_launched() -> bool:
    """Whether this process is a rank that `run_ranks` has started."""
    return LAUNCHER_FD in os.environ


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(processes: int) -> int:
    """Threads of each of so many processes that share this machine's cores: their share, or fewer where
    OMP_NUM_THREADS says so. torchrun sets that itself, and knows of no cores."""
    share, asked = max(1, cores() // processes), os.environ.get("OMP_NUM_THREADS", "")
    known = asked.isdecimal() and int(asked) > 0 and (was_launched() or place() is None)
    return min(int(asked), share) if known else share


def check_ranks(ranks: int) -> None:
    """Refuse a number of ranks that this machine can't start."""
    limit = RANKS_PER_CORE * cores()
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: give 1 or more")
    if ranks > limit:
        raise InputError(f"--ranks {ranks}: {limit} at most, {RANKS_PER_CORE} for each core of this machine")


def run_ranks(arguments: Sequence[str], ranks: int, program: Sequence[str] = PROGRAM) -> int:
    """Run `program` with `arguments` on `ranks` processes until all have ended. What went wrong is told once.

    Args:
        program: what each rank runs; it should do its work within `watch.guarded`.

    Returns:
        The exit code: 0; 2 for bad input; 1 for any other failure; 128 + the signal's number after a signal.
    """
    group = Processes()
    with _signals_to(group):
        try:
            group.start([*program, *arguments], ranks)
            group.wait()
        finally:
            group.kill()
    return group.verdict().say()


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a run have ended."""

    exit_code: int = 0
    messages: tuple[str, ...] = ()
    """What went wrong, each a line of its own. None: all is well."""
    details: str = ""
    """More of it, for a failure that nobody expected."""

    def say(self) -> int:
        """Write it to standard error; returns the exit code."""
        if self.exit_code:
            restore_terminal()
        sys.stderr.write(self.details + "".join(f"halovae: error: {message}\n" for message in self.messages))
        return self.exit_code


@dataclass
class _Rank:
    index: int
    process: subprocess.Popen[bytes]
    report: IO[bytes]
    words: bytearray = field(default_factory=bytearray)
    """The bytes of its `Failure`, as far as they have come."""
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL))
    asked_to_end: bool = False

    @property
    def failure(self) -> Failure | None:
        try:
            return Failure(**json.loads(self.words))
        except ValueError:  # Nothing, or cut off in the middle of a word.
            return None


class Processes:
    """The ranks of one run. `start`, `wait`, and in any case `kill`; then `verdict`.

    Attributes:
        interrupted_by: set it to a signal's number, on any thread, to end the ranks.
    """

    def __init__(self) -> None:
        self.interrupted_by = 0
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._failed_first: list[_Rank] = []
        # Nothing is ever written to this pipe: ranks see its end when this process dies. See `watch`.
        self._life_read, self._life_write = os.pipe()

    def start(self, command: Sequence[str], ranks: int, first: Mapping[str, int] | None = None) -> None:
        """Start `command` on `ranks` processes; the first one inherits the files `first`, by environment variable."""
        shared = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            # Read when the libraries are loaded, before any code of ours can set the number of threads.
            "OMP_NUM_THREADS": threads(ranks),
            LAUNCHER_FD: self._life_read,
        }
        for index in range(ranks):
            report_read, report_write = os.pipe()
            files = {} if index or first is None else first
            own = {"RANK": index, "LOCAL_RANK": index, REPORT_FD: report_write, **files}
            process = subprocess.Popen(
                command,
                env={**os.environ, **{name: str(value) for name, value in (shared | own).items()}},
                stdin=subprocess.DEVNULL,
                # Rank 0 draws the progress bar; the others are heard only if they die.
                stderr=None if index == 0 else subprocess.PIPE,
                pass_fds=(report_write, self._life_read, *files.values()),
                # Ctrl-C in a terminal would reach a rank while it can't clean up; here it comes by way of us.
                start_new_session=True,
            )
            os.close(report_write)
            rank = _Rank(index, process, os.fdopen(report_read, "rb", buffering=0))
            self._ranks.append(rank)
            self._selector.register(rank.report, selectors.EVENT_READ, rank)
            if process.stderr is not None:
                self._selector.register(process.stderr, selectors.EVENT_READ, rank)

    def wait(self) -> None:
        """Until all ranks have ended, which they are made to when one fails or a signal comes."""
        end_at = math.inf
        while any(rank.process.poll() is None for rank in self._ranks):
            self._read(timeout=0.05)
            now = time.monotonic()
            failed = [rank for rank in self._ranks if rank.process.returncode]
            if failed and not self._failed_first:
                self._failed_first = failed
                # After an orderly failure the others may have something to say too.
                orderly = all(rank.process.returncode > 0 for rank in failed)
                end_at = now + (_SETTLE if orderly else 0)
            if self.interrupted_by:
                end_at = min(end_at, now)
            self._end(now - end_at)
        while self._read(timeout=0):
            pass

    def _end(self, seconds: float) -> None:
        for rank in self._ranks:
            if rank.process.poll() is not None or seconds < 0:
                continue
            if seconds >= _KILL_AFTER:
                rank.asked_to_end = True
                rank.process.kill()
            elif not rank.asked_to_end:
                rank.asked_to_end = True
                rank.process.terminate()

    def _read(self, timeout: float) -> bool:
        """Take in what has come on the pipes, or their end; False when there was nothing."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            rank: _Rank = key.data
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is rank.report:
                rank.words += data
            else:
                rank.tail.extend(data.splitlines(keepends=True))
        return bool(ready)

    def kill(self) -> None:
        """Whatever happened, leave no process and no open file behind."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()
            rank.report.close()
            if rank.process.stderr is not None:
                rank.process.stderr.close()
        self._selector.close()
        os.close(self._life_write)
        os.close(self._life_read)

    def verdict(self) -> Outcome:
        """What went wrong, and the exit code that says it too."""
        if self.interrupted_by:
            return Outcome(128 + self.interrupted_by, details="halovae: interrupted\n")
        killed = [rank for rank in self._failed_first if rank.process.returncode < 0]
        if killed:
            return _verdict([_death(rank) for rank in killed])
        reported = sorted((f for rank in self._ranks if (f := rank.failure)), key=lambda failure: failure.time)
        causes = [failure for failure in reported if not failure.consequence] or reported
        expected = [failure for failure in causes if failure.expected]
        if expected:
            return _verdict([failure.message for failure in expected], max(f.exit_code for f in expected))
        if causes:
            return _verdict([causes[0].message], details=causes[0].details)
        tails = b"".join(line for rank in self._failed_first for line in rank.tail)
        words = [f"rank {rank.index} ended with exit code {rank.process.returncode}" for rank in self._failed_first]
        return _verdict(words, details=tails.decode(errors="replace"))


def _verdict(messages: Sequence[str], exit_code: int = 1, details: str = "") -> Outcome:
    """Each different message once. No message: all is well."""
    lines = [line for message in messages for line in message.splitlines()]
    return Outcome(exit_code if messages else 0, tuple(dict.fromkeys(lines)), details)


def _death(rank: _Rank) -> str:
    name = signal.Signals(-rank.process.returncode).name
    hint = " (often the system, when memory runs out)" if name == "SIGKILL" else ""
    return f"rank {rank.index} was killed by {name}{hint}"


@contextmanager
def _signals_to(group: Processes) -> Iterator[None]:
    def note(signum: int, frame: FrameType | None) -> None:
        group.interrupted_by = group.interrupted_by or signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
