"""Errors in the form of OpenAI's interface: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from fastserve.core.errors import failure_reason
from fastserve.server.http.log import logger

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_MESSAGE_CHARACTERS = 2000


class APIError(HTTPException):
    """Refuses a request, with a reason for its client."""

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
    """Return an error with status 400. `message` says what is wrong and what would be right."""
    return APIError(400, message, param=param, code=code)


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of the answer to a refused request, or the event that ends a failed stream."""
    if len(message) > _MAX_MESSAGE_CHARACTERS:  # It may quote what the client sent.
        message = message[:_MAX_MESSAGE_CHARACTERS] + "..."
    kind = _TYPES.get(status_code, "invalid_request_error" if status_code < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response in JSON. It is ASCII, since quotes of what a client sent may have no other encoding."""
    return Response(json.dumps(content), status_code, dict(headers or {}), "application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` this form, those of routing and validation included."""

    @app.exception_handler(StarletteHTTPException)
    async def _refused(http: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        reason = " ".join(str(error.detail).splitlines())  # It may quote what the client sent.
        logger.debug("refused with %d: %s %s", error.status_code, reason, http.state.request_id.said)
        param, code = (error.param, error.code) if isinstance(error, APIError) else (None, None)
        return json_response(error_body(error.status_code, error.detail, param, code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:  # A bug; the log has its traceback.
        return json_response(error_body(500, f"the server has failed: {failure_reason(error)}"), 500)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe(error.errors()[0])
        return json_response(error_body(400, message, param), 400)


def describe(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the message of pydantic's `error`, and the path of the field at fault, such as `messages.3.content`."""
    # Tags of unions, such as `<text>`, are no fields.
    path = [str(step) for step in error["loc"][1:] if not str(step).startswith("<")]
    if not path and error["type"] in ("missing", "model_type", "model_attributes_type"):
        return "the body must be a JSON object, sent with 'Content-Type: application/json'", None
    if error["type"] == "field":
        path.append(error["ctx"]["field"])
        reason = error["msg"]
    else:
        reason = _REASONS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        reason = reason.replace(" after validation", "")
        if error["type"] not in ("missing", "too_long", "string_too_long"):
            reason += f", got {shown(error['input'])}"
    param = ".".join(path) or None
    return f"{param}: {reason}" if param else reason, param


_REASONS = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "Input should be a JSON object")
"""Replace messages of pydantic that name classes of the code."""


class _Shown(reprlib.Repr):
    """Writes true, false and null as JSON does."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"


shown = _Shown().repr
"""Returns a value of a request for an error message, shortened if it is large."""
