"""The web application: its routes put together."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from halovae.serve import api_errors, vae_routes, video_routes
from halovae.serve.guard import Guard
from halovae.serve.service import Service
from halovae.serve.store import QUEUED
from halovae.serve.video_routes import service_of

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""The page needs nothing from anywhere else."""


def make_app(service: Service) -> FastAPI:
    """The application that serves `service`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="halovae",
        version=metadata.version("halovae"),
        lifespan=lifespan,
        # Both load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.started = service, int(time.time())
    api_errors.install(app, service)
    app.include_router(video_routes.router)
    app.include_router(vae_routes.router)
    for path in _PAGE:
        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/health", health, methods=["GET"], tags=["server"], responses={503: {"description": "Not yet"}})
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse, tags=["server"])
    app.add_api_route("/v1/models", models, methods=["GET"], tags=["server"])
    app.add_middleware(Guard, options=service.options, metrics=service.metrics)
    app.openapi = _documented(app)  # type: ignore[method-assign]
    _gauges(service)
    return app


async def page(request: Request) -> Response:
    """A page to try it, and what belongs to it."""
    name, kind = _PAGE[request.url.path]
    content = resources.files("halovae").joinpath("serve", "page", name).read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=kind, headers=headers)


async def health(request: Request) -> JSONResponse:
    """200 when every rank answers, else 503, with what is known."""
    found = service_of(request).health()
    return JSONResponse(found, 200 if found["ready"] else 503)


async def metrics(request: Request) -> PlainTextResponse:
    """Counters and gauges, as Prometheus reads them."""
    return PlainTextResponse(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    options = service_of(request).options
    ranks = service_of(request).ranks
    entry = {
        "id": options.model,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "halovae",
        "task": options.task,
        "pipeline": ranks.facts.get("pipeline"),
        "size_multiple": None if ranks.grid is None else ranks.grid.multiple,
        "frame_period": None if ranks.grid is None else ranks.grid.period,
        "limits": vars(options.limits),
    }
    return {"object": "list", "data": [entry]}


def _gauges(service: Service) -> None:
    gauge = service.metrics.gauge
    gauge("halovae_jobs_queued", "Jobs that wait.", lambda: service.store.count(QUEUED))
    gauge("halovae_busy", "1 while the ranks work on a job.", lambda: service.health()["busy"])
    gauge("halovae_ready", "1 when every rank answers.", lambda: service.health()["ready"])
    gauge("halovae_ranks", "Ranks in the group.", lambda: service.options.ranks)


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _documented(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document, with the shape that errors really have."""
    made = FastAPI.openapi

    def openapi() -> dict[str, Any]:
        document = made(app)
        error = {"description": "Error", "content": {"application/json": {"schema": _ERROR}}}
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["responses"]["4XX"] = error
        document["components"]["schemas"] = {
            name: schema
            for name, schema in document["components"]["schemas"].items()
            if name not in ("HTTPValidationError", "ValidationError")
        }
        return document

    return openapi
