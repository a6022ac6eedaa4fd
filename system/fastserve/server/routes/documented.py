"""Answers other than the usual one, for /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is invalid or cannot be served"},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong"},
    404: {"model": ErrorAnswer, "description": "The model does not exist"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After says when to try again"},
    503: {"model": ErrorAnswer, "description": "The server is stopping, or its engine has failed or is stalled"},
}
INVALID: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorAnswer, "description": "Not used: invalid requests are answered 400"}
}
"""FastAPI documents this status by itself; here it gets the body of other errors."""
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "The answer, or its events with stream: true",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **INVALID,
}
