"""The process that clients talk to: a web server, the store of jobs, and the care for the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from halovae.errors import InputError
from halovae.files import reason
from halovae.serve.app import make_app
from halovae.serve.group import Ranks
from halovae.serve.guard import is_loopback
from halovae.serve.metrics import Metrics
from halovae.serve.service import Service
from halovae.serve.settings import ServeOptions
from halovae.serve.store import Store
from halovae.serve.wire import FRONT_FD

_FAREWELL = 3
"""Seconds that open connections get when the server ends."""


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
    with contextlib.closing(Store(options.store)) as store, _listening(options) as listener:
        return asyncio.run(_serve(options, store, listener, Ranks(arguments, options.ranks, ends)))


async def _serve(options: ServeOptions, store: Store, listener: socket.socket, ranks: Ranks) -> int:
    service = Service(options, store, ranks, Metrics())
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FAREWELL,
        # Headers and bodies of a slow client cost little here; an idle connection nothing.
        limit_concurrency=None,
    )
    server = _Server(config)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    sys.stderr.write(f"halovae: serving {options.model} on http://{shown}:{address[1]}\n")
    _warn(options)
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


def _warn(options: ServeOptions) -> None:
    if not is_loopback(options.host) and options.key is None:
        sys.stderr.write(
            f"halovae: note: {options.host} is open to other machines, without a key: give --api-key-file\n"
        )


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
