"""The web application: its routes put together, who may use them, and errors of one shape."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata, resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halovae.serve import video_routes
from halovae.serve.forms import described
from halovae.serve.server_settings import ServeOptions
from halovae.serve.service import ApiError, Metrics, Service
from halovae.serve.store import ERRORS, QUEUED
from halovae.serve.video_routes import Serving

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_OPEN = (*_PAGE, "/health")
"""What everyone may see: nothing in it tells of any job."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""The page needs nothing from anywhere else."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def make_app(service: Service) -> FastAPI:
    """The application that serves `service`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer_to(_told(service, request, error))

    kind = {"model": Problem, "description": "Error"}
    app = FastAPI(
        title="halovae",
        version=metadata.version("halovae"),
        lifespan=lifespan,
        responses={"4XX": kind, "5XX": kind},
        # Both load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.started = service, int(time.time())
    for each in (HTTPException, RequestValidationError, ClientDisconnect, *ERRORS, Exception):
        app.add_exception_handler(each, failed)
    app.include_router(video_routes.router)
    app.include_router(video_routes.vae)
    for path in _PAGE:
        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/health", health, methods=["GET"], tags=["server"], responses={503: {"description": "Not yet"}})
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse, tags=["server"])
    app.add_api_route("/v1/models", models, methods=["GET"], tags=["server"])
    app.add_middleware(Guard, options=service.options, metrics=service.metrics)
    gauge = service.metrics.gauge
    gauge("halovae_jobs_queued", "Jobs that wait.", lambda: service.store.count(QUEUED))
    gauge("halovae_busy", "1 while the ranks work on a job.", lambda: service.health()["busy"])
    gauge("halovae_ready", "1 when every rank answers.", lambda: service.health()["ready"])
    gauge("halovae_ranks", "Ranks in the group.", lambda: service.options.ranks)
    return app


async def page(request: Request) -> Response:
    """A page to try it, and what belongs to it."""
    name, kind = _PAGE[request.url.path]
    content = resources.files("halovae").joinpath("serve", "page", name).read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=kind, headers=headers)


async def health(service: Serving) -> JSONResponse:
    """200 when every rank answers, else 503, with what is known."""
    found = service.health()
    return JSONResponse(found, 200 if found["ready"] else 503)


async def metrics(service: Serving) -> PlainTextResponse:
    """Counters and gauges, as Prometheus reads them."""
    return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def models(request: Request, service: Serving) -> dict[str, Any]:
    """The one model that is served."""
    options, ranks = service.options, service.ranks
    entry = {
        "id": options.model,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "halovae",
        "task": options.task,
        "pipeline": ranks.facts.get("pipeline"),
        "size_multiple": None if ranks.grid is None else ranks.grid.multiple,
        "frame_period": None if ranks.grid is None else ranks.grid.step,
        "limits": vars(options.limits),
    }
    return {"object": "list", "data": [entry]}


# ---- errors ----------------------------------------------------------------------------------------------------------


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    """An error as clients of OpenAI's API know it."""

    error: _Error


def _told(service: Service, request: Request, error: Exception) -> HTTPException:
    """What to answer when a request has failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        asked = f"there is no {request.method} {request.url.path[:80]}: "
        allowed = (error.headers or {}).get("Allow")
        words = {405: f"{asked}use {allowed}", 404: f"{asked}/openapi.json tells what there is"}
        return ApiError(error.status_code, words.get(error.status_code, error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        faults = [described({**each, "loc": each["loc"][1:]}) for each in error.errors()]
        message = "; ".join(message for _, message in faults)
        return ApiError(400, message, param=faults[0][0], code="invalid_value")
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "the request did not come to its end")
    if isinstance(error, ERRORS):
        return service.no_room(error)
    # The web server logs it.
    return ApiError(500, "the server has failed at this request; its log says why")


def answer_to(error: HTTPException) -> JSONResponse:
    """An error as clients get it."""
    problem = _Error(
        message=error.detail,
        type=_TYPES.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error"),
        param=getattr(error, "param", None),
        code=getattr(error, "code", None),
    )
    return JSONResponse({"error": problem.model_dump()}, error.status_code, headers=error.headers)


# ---- who may ask -----------------------------------------------------------------------------------------------------


class Guard:
    """Stands before the application, counts requests and turns some away.

    Who may ask: whoever has the key, where there is one; else only pages of this server, when a browser asks.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._under_way = 0

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
                raise self._too_much()
            return message

        self._under_way += 1
        try:
            refusal = self._refusal(scope)
            await (self._app if refusal is None else answer_to(refusal))(asked, limited, counted)
        finally:
            self._under_way -= 1
            route = getattr(asked.get("route"), "path", "(none)")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()

    def _too_much(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._options.limits.upload_bytes} bytes: send less")

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, most = Headers(scope=scope), self._options.limits.requests
        if self._under_way > most:
            busy = f"{most} requests are being answered, the most at once: try again"
            return ApiError(503, busy, code="too_many_requests", headers={"Retry-After": "1", "Connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._options.limits.upload_bytes:
            return self._too_much()
        if self._options.key is None:
            return _foreign_page(headers, self._options.host)
        if scope["path"] in _OPEN:
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
