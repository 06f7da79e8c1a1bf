"""Errors as clients of OpenAI's API know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, headers=dict(self.headers or {}))


def install(app: FastAPI) -> None:
    """Let every error of `app` have this shape."""

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

    def unexpected(request: Request, error: Exception) -> JSONResponse:
        traceback.print_exception(error)
        return ApiError(500, "the server has failed at this request; its log says why").response()

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, unexpected)


def _field_error(error: RequestValidationError) -> ApiError:
    first: Mapping[str, Any] = error.errors()[0]
    place, *names = first["loc"] or ("request",)
    field = str(names[0]) if names else None
    value = first.get("input")
    shown = f" ({str(value)[:60]!r})" if isinstance(value, (str, int, float)) else ""
    where = f"{field}{shown}" if field else str(place)
    return ApiError(400, f"{where}: {first['msg']}", param=field, code=first["type"])
