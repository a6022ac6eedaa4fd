"""What is done for every HTTP request, whatever its route: an id, a count, a line in the access log."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.server.log import logger
from fastserve.server.request_id import request_id
from fastserve.server.service import COUNTED, Server

_HEADER = b"x-request-id"
GAVE_UP = "gave_up"
"""Key in a scope's state: the status with which the protocol ended a request that did not arrive whole."""
_CLIENT_GONE = 499


class Front:
    """Gives each request an id, which its response has as x-request-id, and records how it was answered."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # With it routes are found whether a proxy has stripped the path or not.
        scope["root_path"] = self._server.options.root_path
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
            self._server.load -= state.get(COUNTED, False)
            status = state.get(GAVE_UP, status)
            route = getattr(scope.get("route"), "path_format", "other")
            self._server.metrics.answered(scope["method"], route, status)
            if logger.isEnabledFor(logging.INFO):
                client = scope.get("client") or ("-", 0)
                path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
                logger.info(
                    '%s:%s "%s %s" %d %.3f s %s',
                    *(client[0], client[1], scope["method"], path, status, time.perf_counter() - began),
                    name.said,
                )
