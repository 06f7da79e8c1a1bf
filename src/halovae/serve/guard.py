"""Who may ask, and how much at once: a key where there is one; else only pages of this server, when a browser asks."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halovae.serve.api_errors import ApiError
from halovae.serve.metrics import Metrics
from halovae.serve.server_settings import ServeOptions

OPEN = ("/", "/page.css", "/page.js", "/health")
"""What everyone may see: nothing in it tells of any job."""


class Guard:
    """Stands before the application, counts requests and turns some away.

    Args:
        app: the application.
        options: of the server.
        metrics: gets the counts.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, ended = 500, False
        # Routes know GET. The answer to HEAD is the same, without its body.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def counted(message: Message) -> None:
            nonlocal status, ended
            if ended:
                return
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["method"] == "HEAD":
                    # All of the answer, also where there would be no end to its body.
                    ended = True
                    await send({"type": "http.response.body"})

        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._options.limits.upload_bytes:
                raise HTTPException(413, self._too_much().message)
            return message

        try:
            refusal = self._refusal(scope)
            await (self._app if refusal is None else refusal.response())(asked, limited, counted)
        finally:
            route = getattr(asked.get("route"), "path", "(none)")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()

    def _too_much(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._options.limits.upload_bytes} bytes: send less")

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._options.limits.upload_bytes:
            return self._too_much()
        if self._options.key is None:
            return _foreign_page(headers, self._options.host)
        if scope["path"] in OPEN:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long a refusal takes must not tell how much of a guess was right.
        right = hmac.compare_digest(key.strip().encode(), self._options.key.encode())
        if kind.lower() == "bearer" and right:
            return None
        return ApiError(
            401,
            "this server wants a key: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _foreign_page(headers: Headers, host: str) -> ApiError | None:
    """Any page that a user visits can make the browser send requests to this machine."""
    named = headers.get("host", "")
    if is_loopback(host) and not is_loopback(urlsplit(f"//{named}").hostname or ""):
        return ApiError(403, f"this server answers to this machine's own names only, not to {named[:80]!r}")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != named:
        return ApiError(403, f"pages of {origin[:80]!r} may not use this server: it has no API key")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return ApiError(403, "pages of other sites may not use this server: it has no API key")
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by that name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
