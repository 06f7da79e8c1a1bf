"""The group of ranks behind a front: started, watched, and started again when it has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halovae.app.launch import PROGRAM, Outcome, Processes
from halovae.app.watch import restore_terminal
from halovae.base.errors import HalovaeError, InputError
from halovae.pipelines.grid import TokenGrid
from halovae.serve.server_settings import RANK_FD

Message = dict[str, Any]
log = logging.getLogger(__name__)
SILENT_SECONDS = 10.0
"""An idle group that has not been heard for so long does not answer."""
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts to start a group that keeps ending."""
_LONGEST_LINE = 2**24
"""Bytes of a message."""
_WELL = 60.0
"""Seconds of work after which a group that ends is started again at once."""


class Ranks:
    """Ranks that do one task at a time, each started with the arguments of the command line.

    Attributes:
        ready: whether the pipeline is loaded on every rank.
        facts: what the ranks tell of the pipeline.
        starts: how often a group was started.
        trouble: why the last group ended.
        heard: when the ranks gave the last sign of life, on the monotonic clock.
    """

    def __init__(self, arguments: Sequence[str], count: int) -> None:
        self.count = count
        self.ready, self.facts = False, dict[str, Any]()
        self.starts, self.trouble, self.heard = 0, "", time.monotonic()
        self._arguments = arguments
        self._group: Processes | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = False

    @property
    def grid(self) -> TokenGrid | None:
        """What sizes the pipeline takes; None until it has been loaded for the first time."""
        return TokenGrid(**self.facts["grid"]) if self.facts else None

    async def run(self, on_message: Callable[[Message], None], on_end: Callable[[str], None]) -> None:
        """Keep a group running until `stop`, and tell what the first rank says, and why a group has ended.

        Raises:
            HalovaeError: the first group could not load the pipeline.
        """
        pause = 1.0
        while not self._stopping:
            started = time.monotonic()
            was_ready, verdict = await self._run_once(on_message)
            if self._stopping:
                return
            self.trouble = "; ".join(verdict.messages) or "the ranks have ended"
            on_end(self.trouble)
            if self.starts == 1 and not was_ready:
                sys.stderr.write(verdict.details)
                raise (InputError if verdict.exit_code == 2 else HalovaeError)(self.trouble)
            restore_terminal()
            details = verdict.details and f"\n{verdict.details.rstrip()}"
            log.error("%s; the ranks are started again%s", self.trouble, details)
            if time.monotonic() - started < _WELL:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = 1.0

    def send(self, message: Mapping[str, Any]) -> None:
        """To the first rank. Lost if it has just ended, which `on_end` then tells."""
        if self._writer is not None:
            self._writer.write(json.dumps(message).encode() + b"\n")

    def stop(self) -> None:
        """End the ranks, and with them `run`."""
        self._stopping = True
        if self._group is not None:
            self._group.interrupted_by = signal.SIGTERM
        if self._writer is not None:
            self._writer.close()

    async def _run_once(self, on_message: Callable[[Message], None]) -> tuple[bool, Outcome]:
        """One group from start to end."""
        self.starts += 1
        ours, theirs = socket.socketpair()
        self._group = group = Processes()
        try:
            with theirs:
                group.start([*PROGRAM, *self._arguments], self.count, {RANK_FD: theirs.fileno()})
            waiting = asyncio.create_task(asyncio.to_thread(group.wait))
            was_ready = await self._listen(ours, on_message)
            await waiting
        finally:
            group.kill()
        return was_ready, group.verdict()

    async def _listen(self, end: socket.socket, on_message: Callable[[Message], None]) -> bool:
        """Take in messages until the group's end; whether it has been ready."""
        reader, self._writer = await asyncio.open_unix_connection(sock=end, limit=_LONGEST_LINE)
        was_ready = False
        try:
            while line := await reader.readline():
                message = json.loads(line)
                self.heard = time.monotonic()
                if message["event"] == "ready":
                    self.facts, self.ready, was_ready = message, True, True
                on_message(message)
        except (ConnectionError, ValueError):
            pass  # It died in the middle of a line.
        finally:
            self.ready = False
            self._writer.close()
            self._writer = None
        return was_ready
