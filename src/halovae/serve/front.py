"""The process that clients talk to: a web server, the store of jobs, and the care for the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.config
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence

import uvicorn

from halovae.base.errors import InputError
from halovae.base.files import reason
from halovae.serve import connections
from halovae.serve.guard import is_loopback
from halovae.serve.messages import FRONT_FD
from halovae.serve.metrics import Metrics
from halovae.serve.ranks import Ranks
from halovae.serve.server_settings import ServeOptions
from halovae.serve.service import Service
from halovae.serve.store import Store
from halovae.serve.web import make_app

_FAREWELL = 3
"""Seconds that open connections get when the server ends."""

log = logging.getLogger(__name__)


def serve(options: ServeOptions, arguments: Sequence[str]) -> int:
    """Serve until a signal comes.

    Args:
        options: of the server.
        arguments: of the command line, which ranks are started with.

    Returns:
        The exit code: 0 after SIGINT or SIGTERM.

    Raises:
        HalovaeError: the address or the store can't be used, or the ranks can't be started.
    """
    given = os.environ.pop(FRONT_FD, None)
    ends = None if given is None else socket.socket(fileno=int(given))
    logging.config.dictConfig(connections.LOGGING)
    with contextlib.closing(Store(options.store)) as store, _listening(options) as listener:
        # What is uploaded fills the store's disk or none.
        tempfile.tempdir = str(store.files)
        return asyncio.run(_serve(options, store, listener, Ranks(arguments, options.ranks, ends)))


async def _serve(options: ServeOptions, store: Store, listener: socket.socket, ranks: Ranks) -> int:
    service = Service(options, store, ranks, Metrics())
    most = connections.most_requests()
    config = uvicorn.Config(
        make_app(service),
        http=connections.Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FAREWELL,
        limit_concurrency=most,
        backlog=min(most, 128),
    )
    server = _Server(config)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log.info("serving %s on http://%s:%d", options.model, shown, address[1])
    if not is_loopback(options.host) and options.key is None:
        log.warning("%s is open to other machines, without a key: give --api-key-file", options.host)
    working = asyncio.create_task(ranks.run(service))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait((working, serving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Before the web server: what waits for a job must hear that there will be none.
        server.should_exit = True
        ranks.stop()
    await serving
    await working
    return 0


class _Server(uvicorn.Server):
    """Ends at the first signal, in order, and then lets the process go on to its own end."""

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
