"""What every HTTP request gets, whatever its route: an id, a count, a line in the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.server.http.log import logger
from fastserve.server.http.request_id import request_id

GAVE_UP = "gave_up"
"""Key in a scope's state: the status with which the protocol ended a request that did not arrive whole."""
_COUNTED = "counted"
"""Key in a scope's state: `Load` counts the request."""
_HEADER = b"x-request-id"
_CLIENT_GONE = 499


class Load:
    """Counts the requests whose answers are being generated."""

    def __init__(self) -> None:
        self.num_requests = 0

    def begin(self, http: Request) -> None:
        """Count a request until it is answered."""
        self.num_requests += 1
        setattr(http.state, _COUNTED, True)

    def end(self, scope: Scope) -> None:
        """Count a request no longer, if it is counted."""
        self.num_requests -= scope["state"].pop(_COUNTED, False)


class Front:
    """Gives each request an id, which its response has as x-request-id, and records how it was answered."""

    def __init__(self, app: ASGIApp, root_path: str, load: Load, answered: Callable[[str, str, int], None]) -> None:
        """`root_path`: path below which a proxy offers the server. `answered`: takes method, route and status."""
        self._app = app
        self._root_path = root_path
        self._load = load
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path  # Routes are then found whether a proxy strips the path or not.
        state = scope.setdefault("state", {})
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        state["request_id"] = name = request_id(given)
        id_header = (_HEADER, name.said.encode())
        began = time.perf_counter()
        status = _CLIENT_GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._load.end(scope)
            status = state.get(GAVE_UP, status)
            route = getattr(scope.get("route"), "path_format", "other")
            self._answered(scope["method"], route, status)
            if logger.isEnabledFor(logging.INFO):
                client = scope.get("client") or ("-", 0)
                path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
                logger.info(
                    '%s:%s "%s %s" %d %.3f s %s',
                    *(client[0], client[1], scope["method"], path, status, time.perf_counter() - began),
                    name.said,
                )
