"""The process that clients talk to: a web server, the store of jobs, and the care for the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.config
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from halovae.base.errors import InputError
from halovae.base.files import reason
from halovae.serve.ranks import Ranks
from halovae.serve.server_settings import ServeOptions
from halovae.serve.service import ApiError, Metrics, Service
from halovae.serve.store import Store
from halovae.serve.web import answer_to, is_loopback, make_app

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
_QUIET_SECONDS = 60.0
_FAREWELL = 3
"""Seconds that open connections get when the server ends."""
_CLIENTS = "halovae.serve.clients"

log = logging.getLogger(__name__)
log_of_clients = logging.getLogger(_CLIENTS)


def serve(options: ServeOptions, arguments: Sequence[str]) -> int:
    """Serve until a signal comes. `arguments` of the command line are those that ranks are started with."""
    logging.config.dictConfig(LOGGING)
    with contextlib.closing(Store(options.store)) as store, _listening(options) as listener:
        # What is uploaded fills the store's disk or none.
        tempfile.tempdir = str(store.files)
        return asyncio.run(_serve(options, store, listener, Ranks(arguments, options.ranks)))


async def _serve(options: ServeOptions, store: Store, listener: socket.socket, ranks: Ranks) -> int:
    service = Service(options, store, ranks, Metrics())
    most = options.limits.requests
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FAREWELL,
        limit_concurrency=most,
        backlog=min(most, 128),
    )
    server = _Server(config, service.leave)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log.info("serving %s on http://%s:%d", options.model, shown, address[1])
    if not is_loopback(options.host) and options.key is None:
        log.warning("%s is open to other machines, without a key: give --api-key-file", options.host)
    working = asyncio.create_task(ranks.run(service.on_message, service.on_end))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait((working, serving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Before the web server: what waits for a job must hear that there will be none.
        service.leave()
        server.should_exit = True
        ranks.stop()
    await serving
    await working
    return 0


class _Server(uvicorn.Server):
    """Ends at the first signal, in order, and then lets the process go on to its own end; calls `leave` before."""

    def __init__(self, config: uvicorn.Config, leave: Callable[[], object]) -> None:
        super().__init__(config)
        self._leave = leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._leave()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self.handle_exit, signum, None)
        yield


@contextlib.contextmanager
def _listening(options: ServeOptions) -> Iterator[socket.socket]:
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # Before the address is told: who comes at once waits and is not turned away.
    except socket.gaierror as error:
        raise InputError(f"--host {options.host}: {error.strerror}") from error
    except OSError as error:
        raise InputError(f"can't listen on {options.host}, port {options.port}: {reason(error)}") from error
    with listener:
        yield listener


# ---- what one connection may hold, and for how long ------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's own, with limits: who has no key yet must not be able to keep others out.

    uvicorn limits requests at once and idle connections, but waits for ever for the rest of a request that has begun.
    """

    _key: Any = None
    _since = 0.0
    _received = 0
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        # Too many requests are the application's affair: uvicorn's answer to them has not the shape of its errors.
        most, self.limit_concurrency = self.limit_concurrency or 0, None
        if len(self.connections) >= most:
            log_of_clients.warning(
                "%d connections are the most: those are closed that have asked nothing for a while", most
            )
            self._make_room(most)

    def _make_room(self, most: int) -> None:
        """Where all ask something there is none, and the application says so; but not to any number of them."""
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
        self._stuck = self.loop.call_later(_TAKE_SECONDS, self._give_up, "the answer was not taken")

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
        self._late = self.loop.call_at(self._since + seconds, self._give_up, "the request did not come to its end")

    def _give_up(self, why: str) -> None:
        log_of_clients.warning("a connection was closed: %s in time", why)
        if self.conn.our_state is h11.SEND_RESPONSE:
            self._refuse(ApiError(408, f"{why} in time"))
        else:
            self.transport.abort()

    def eof_received(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.SEND_RESPONSE:
            self._refuse(ApiError(400, "the request did not come to its end"))

    def _refuse(self, error: ApiError) -> None:
        """Answer a request whose rest is not waited for."""
        answer = answer_to(error)
        headers, phrase = [*answer.raw_headers, (b"connection", b"close")], HTTPStatus(error.status_code).phrase
        head = h11.Response(status_code=error.status_code, headers=headers, reason=phrase)
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


# ---- what the server says --------------------------------------------------------------------------------------------


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
        **dict.fromkeys((_CLIENTS, "uvicorn.error", "asyncio"), _THEIRS),
    },
}
"""What the server says, with times, on standard error."""
