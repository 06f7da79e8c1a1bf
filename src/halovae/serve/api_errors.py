"""Errors as clients of OpenAI's API know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from halovae.serve.store import ERRORS

if TYPE_CHECKING:
    from halovae.serve.service import Service

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that can't be answered as asked.

    Attributes:
        status: of HTTP.
        message: what is wrong, which value, what is allowed.
        param: the field to blame, if it is one.
        code: the same for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What was sent as JSON may hold halves of characters, which no answer can.
        message = message.encode("utf-8", "backslashreplace").decode()
        param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, headers=dict(self.headers or {}))


def install(app: FastAPI, service: Service) -> None:
    """Let every error of `app`, which serves `service`, have this shape."""

    def of_ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    def of_fields(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _field_error(error).response()

    def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def of_store(request: Request, error: Exception) -> JSONResponse:
        return service.no_room(error).response()

    def of_gone(request: Request, error: Exception) -> JSONResponse:
        return ApiError(400, "the request did not come to its end").response()

    def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The web server logs it.
        return ApiError(500, "the server has failed at this request; its log says why").response()

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)
    for kind in ERRORS:
        app.add_exception_handler(kind, of_store)
    app.add_exception_handler(ClientDisconnect, of_gone)
    app.add_exception_handler(Exception, unexpected)


def _field_error(error: RequestValidationError) -> ApiError:
    faults = [described({**each, "loc": each["loc"][1:]}) for each in error.errors()]
    return ApiError(400, "; ".join(message for _, message in faults), param=faults[0][0], code="invalid_value")


def described(error: Mapping[str, Any]) -> tuple[str, str]:
    """The field that one of pydantic's errors blames, and what to say of it."""
    name, value = str((*error["loc"], "request")[0]), error.get("input")
    shown = f" ({str(value)[:60]!r})" if isinstance(value, (str, int, float)) else ""
    return name, f"{name}{shown}: {error['msg']}"
