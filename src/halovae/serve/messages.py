"""Between the front and the first rank: lines of JSON over a pair of sockets."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

RANK_FD = "HALOVAE_SERVE_RANK_FD"
"""Environment of the first rank: the number of its end."""
FRONT_FD = "HALOVAE_SERVE_FRONT_FD"
"""Environment of a front that a rank has started: the number of its end."""
_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

Message = dict[str, Any]


class Wire:
    """The first rank's end.

    Args:
        end: a connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._words = b""

    @classmethod
    def inherited(cls, name: str) -> Wire | None:
        """The end that this process was started with, if it was."""
        number = os.environ.get(name)
        return None if number is None else cls(socket.socket(fileno=int(number)))

    @classmethod
    def to_new_front(cls, command: Sequence[str]) -> Wire:
        """Start a front that serves the ranks that are there already, and ends with this process."""
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_NAMES}
        with theirs:
            environment[FRONT_FD] = str(theirs.fileno())
            # A session of its own: the launcher's signals are for ranks, and the front ends when this process does.
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        return cls(ours)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message.

        Raises:
            OSError: the front has gone.
        """
        self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Message | None:
        """The next message, or None when none comes within so many seconds.

        Raises:
            EOFError: the front has gone.
        """
        while b"\n" not in self._words:
            ready, _, _ = select.select([self._end], [], [], seconds)
            if not ready:
                return None
            try:
                words = self._end.recv(65536)
            except ConnectionError:
                words = b""
            if not words:
                raise EOFError("the front of the server has ended")
            self._words += words
        line, _, self._words = self._words.partition(b"\n")
        return json.loads(line)
