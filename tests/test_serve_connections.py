"""Who has no key can't keep others out: half a request is not waited for long, and gives way to whole ones."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx2
import pytest
import uvicorn
from servers import Server

from halovae.serve import front
from halovae.serve.server_settings import ServeOptions, ServerLimits
from halovae.serve.service import Metrics
from halovae.serve.web import Guard

MOST = 8
Connect = Callable[[], socket.socket]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole request, unless its path is /refused; answers with more than a socket takes, if it is /large."""
    more = scope["path"] != "/refused"
    while more:
        message = await receive()
        more = message.get("more_body", False) and message["type"] == "http.request"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(2**25 if scope["path"] == "/large" else 2)})


@pytest.fixture(scope="module")
def connect() -> Iterator[Connect]:
    """A server with the limits, but in tenths of seconds; a new connection to it."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack, socket.socket() as listener:
        for name in ("HEAD_SECONDS", "BODY_SECONDS", "_LINGER", "_TAKE_SECONDS"):
            patch.setattr(front, name, 0.5)
        patch.setattr(front, "_SILENT_SECONDS", 0.1)
        listener.bind(("127.0.0.1", 0))
        options = ServeOptions(model="demo", task="image-to-video", ranks=1, limits=ServerLimits(requests=MOST))
        guarded = Guard(app, options, Metrics())
        config = uvicorn.Config(
            guarded, http=front.Connection, ws="none", log_config=None, limit_concurrency=MOST, lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def connected() -> socket.socket:
            return stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20))

        while not server.started:
            time.sleep(0.01)
        yield connected
        server.should_exit = True
        thread.join()


def closed(end: socket.socket) -> tuple[float, bytes]:
    """After how many seconds the other side has closed it, and what it said before."""
    began, said = time.monotonic(), b""
    try:
        while words := end.recv(65536):
            said += words
    except ConnectionResetError:
        pass
    return time.monotonic() - began, said


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab",
        b"POST /refused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab",
    ],
    ids=["nothing", "half of a head", "half of a body", "a refused body"],
)
def test_half_a_request_is_not_waited_for(connect: Connect, words: bytes) -> None:
    end = connect()
    end.sendall(words)
    seconds, said = closed(end)
    assert 0.3 < seconds < 10
    assert (b" 200 " in said) == (b"refused" in words)
    late = b" 408 " in said and b'"the request did not come to its end in time"' in said
    assert late == words.startswith(b"POST / ")


def test_a_body_that_ends_short_is_refused_at_once(connect: Connect) -> None:
    end = connect()
    end.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab")
    end.shutdown(socket.SHUT_WR)
    seconds, said = closed(end)
    assert seconds < 0.3
    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'{"error":{"message":"the request did not come to its end"' in said


def test_a_byte_now_and_then_is_no_request(connect: Connect) -> None:
    end = connect()
    end.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
    sent = 0
    with suppress(ConnectionError):
        while sent < 100:
            sent += end.send(b"a")
            time.sleep(0.1)
    assert sent < 50


def test_a_slow_but_whole_body_is_taken(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "BODY_RATE", 1000)
    end = connect()
    end.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n\r\n")
    for _ in range(10):
        end.sendall(bytes(300))
        time.sleep(0.1)
    assert end.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_answer_that_nobody_takes_is_given_up(connect: Connect) -> None:
    end = connect()
    end.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(1.5)
    assert len(closed(end)[1]) < 2**25


def test_whole_requests_come_before_silent_connections(connect: Connect) -> None:
    silent = [connect() for _ in range(MOST)]
    time.sleep(0.2)
    end = connect()
    end.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    seconds, said = closed(end)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert seconds < 0.25, "before the silent ones had to go"
    assert all(not closed(one)[1] for one in silent)


def test_where_all_ask_something_there_are_too_many(connect: Connect) -> None:
    busy = [connect() for _ in range(MOST)]
    for end in busy:
        end.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab")
    end = connect()
    end.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head, _, body = closed(end)[1].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head.lower()
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("server_error", "too_many_requests")
    assert error["message"] == "8 requests are being answered, the most at once: try again"


def test_messages_that_clients_make_come_once_a_minute() -> None:
    seen: list[str] = []
    logger, handler = logging.getLogger("test of connections"), logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    seldom = front.Seldom()
    logger.addFilter(seldom)
    logger.propagate = False
    for number in range(100):
        logger.warning("client %d sent nonsense", number)
        logger.warning("client %d sent nothing", number)
    assert seen == ["client 0 sent nonsense", "client 0 sent nothing"]
    seldom.kinds = {kind: (last - 61, held) for kind, (last, held) in seldom.kinds.items()}
    logger.warning("client %d sent nonsense", 100)
    assert seen[2:] == ["client 100 sent nonsense (and 99 more like it)"]


def test_hundreds_of_half_open_connections(server: Server) -> None:
    """More than the server may have files open; on this machine's loopback, for a second or two."""
    host, port = server.address.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for number in range(300):
            end = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            with suppress(ConnectionError):
                end.sendall(b"no request at all\r\n\r\n" if number % 10 == 0 else b"GET / HT")
        time.sleep(1.1)
        assert httpx2.get(f"{server.address}/health", timeout=5).json()["ready"]
