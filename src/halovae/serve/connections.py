"""What one connection may hold, and for how long: who has no key yet must not be able to keep others out.

uvicorn limits requests at once and idle connections, but waits for ever for the rest of a request that has begun.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""For the line and the headers of a request, from the connection or the last answer on."""
BODY_SECONDS = 30.0
"""For a body, and a second more for each `BODY_RATE` bytes that have come."""
BODY_RATE = 16 * 2**10
_SILENT_SECONDS = 1.0
"""Without a whole head; from then on a connection gives way to others, if there are too many."""
_LINGER = 5.0
"""For what still comes of a body after its answer."""
_TAKE_SECONDS = 60.0
"""For a client to take some of its answer."""
_OWN_FILES = 64
"""Descriptors for all but clients."""
_QUIET_SECONDS = 60.0

log = logging.getLogger(__name__)


def most_requests() -> int:
    """How many there may be at once, of the number of files that this process may open.

    A quarter of that: each request has a connection, and a file or two of its own; connections that are to be turned
    away, and those that come at the same instant, take a quarter each at most.
    """
    spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_FILES
    return min(max(spare // 4, 1), 1000)


class Connection(H11Protocol):
    """uvicorn's own, with limits."""

    _key: Any = None
    _since = 0.0
    _received = 0
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        most = self.limit_concurrency or 0
        if len(self.connections) >= most:
            log.warning("%d connections are the most: those are closed that have asked nothing for a while", most)
            self._make_room(most)

    def _make_room(self, most: int) -> None:
        """Where all ask something there is none, and uvicorn says so; but not to any number of them."""
        silent = [one for one in self.connections if isinstance(one, Connection) and one.silent > _SILENT_SECONDS]
        if not silent and len(self.connections) > most + min(most, 64):
            silent = [self]
        for one in sorted(silent, key=lambda one: one.silent)[most - len(self.connections) - 1 :]:
            self.connections.discard(one)
            one.transport.abort()

    @property
    def silent(self) -> float:
        """For how many seconds a request has been waited for."""
        return self.loop.time() - self._since if self.conn.their_state is h11.IDLE else 0.0

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(_TAKE_SECONDS, self._give_up, "an answer was not taken")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def _watch(self) -> None:
        """Set the time until which the client has to be done with what it sends."""
        state = self.conn.their_state
        answered = bool(self.cycle) and self.cycle.response_complete
        if self._key != (state, answered):
            self._key, self._since, self._received = (state, answered), self.loop.time(), 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if state is h11.IDLE:
            seconds = HEAD_SECONDS
        elif state is h11.SEND_BODY:
            seconds = _LINGER if answered else BODY_SECONDS + self._received / BODY_RATE
        else:
            return
        self._late = self.loop.call_at(self._since + seconds, self._give_up, "a request did not come to its end")

    def _give_up(self, why: str) -> None:
        log.warning("a connection was closed: %s in time", why)
        self.transport.abort()


class Seldom(logging.Filter):
    """Lets one message of a kind through in a minute: clients make these, as many as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.levelno, str(record.msg).partition("\n")[0], record.exc_info and record.exc_info[0]
        last, held = self.kinds.get(kind, (0.0, 0))
        now = time.monotonic()
        if last and now - last < _QUIET_SECONDS:
            self.kinds[kind] = last, held + 1
            return False
        self.kinds[kind] = now, 0
        if held:
            record.msg = f"{str(record.msg).rstrip()} (and {held} more like it)"
        return True


_THEIRS: dict[str, Any] = {"filters": ["seldom"], "level": "WARNING", "handlers": ["stderr"], "propagate": False}
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s halovae: %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}},
    "filters": {"seldom": {"()": Seldom}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "halovae.serve": {"level": "INFO", "handlers": ["stderr"], "propagate": False},
        **dict.fromkeys((__name__, "uvicorn.error", "asyncio"), _THEIRS),
    },
}
"""What the server says, with times, on standard error."""
