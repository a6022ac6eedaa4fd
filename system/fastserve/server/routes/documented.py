"""What /openapi.json says of answers other than the usual one."""

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
    400: {"model": ErrorAnswer, "description": "The request cannot be served as it is"},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong"},
    404: {"model": ErrorAnswer, "description": "There is no such model"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After says when to come again"},
    503: {"model": ErrorAnswer, "description": "The server is stopping, or its engine has failed"},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "The answer, or with stream: true its events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    422: {"model": ErrorAnswer, "description": "Not used: what is invalid is answered 400"},
}
