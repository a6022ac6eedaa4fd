"""Errors as a client of OpenAI's interface expects them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(HTTPException):
    """A request that is refused, with the reason for its sender."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, dict(headers or {}))
        self.param = param
        self.code = code


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """Status 400: the sender must change something, and `message` says what."""
    return APIError(400, message, param=param, code=code)


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The answer to a refused request, or the event that ends a stream."""
    kind = _TYPES.get(status_code, "invalid_request_error" if status_code < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: what clients send and we quote need not be encodable otherwise."""
    return Response(json.dumps(content), status_code, dict(headers or {}), "application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` this form, those of routing and validation too."""

    @app.exception_handler(StarletteHTTPException)
    async def _refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        param, code = (error.param, error.code) if isinstance(error, APIError) else (None, None)
        return json_response(error_body(error.status_code, error.detail, param, code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
            return json_response(error_body(400, reason), 400)
        if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
            reason = "the body must be a JSON object, sent with 'Content-Type: application/json'"
            return json_response(error_body(400, reason), 400)
        place = ".".join(map(str, first["loc"][1:2]))
        # Where a field may be of several kinds, it has failed to be each of them.
        reasons = dict.fromkeys(
            each["msg"].removeprefix("Value error, ") for each in error.errors() if each["loc"][:2] == first["loc"][:2]
        )
        message = " / ".join(reasons)
        return json_response(error_body(400, f"{place}: {message}" if place else message, place or None), 400)
