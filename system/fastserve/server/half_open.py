"""Requests that do not arrive whole: the HTTP protocol gives them a limited time, and none once the server stops.

Without this a client that sends half a request holds its connection for ever, and with it the server's end.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastserve.server.errors import error_body
from fastserve.server.front import GAVE_UP


def http_protocol(receive_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for HTTP/1.1, in which a request's head and body must arrive within that time."""

    class Protocol(_ArrivingInTime):
        _receive_timeout_s = receive_timeout_s

    return Protocol


class _ArrivingInTime(HttpToolsProtocol):
    _receive_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        """Runs from the first byte of a request, or from the beginning of the connection, to the request's last."""
        self._begun = self._head_complete = False
        """Whether the request that arrives now has begun, and its head is there."""

    # -- as asyncio, httptools and uvicorn call it ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        self._start_timer()
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._start_timer()
        self._begun, self._head_complete = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_complete = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._begun = False
        self._stop_timer()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._begun and not self._is_answering_another():
            self._refuse(503, "the server is stopping, and the request has not arrived whole")
        else:
            super().shutdown()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._receive_timeout_s, self._time_is_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        self._timer = None
        if self._is_answering_another():  # Which may be why the rest of this one has not been read.
            self._start_timer()
        else:
            self._refuse(408, f"the request did not arrive whole within {self._receive_timeout_s:g} s")

    def _is_answering_another(self) -> bool:
        """Whether a request that arrived before this one on the same connection is still being answered."""
        earlier = not self._head_complete and self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or earlier

    def _refuse(self, status: int, message: str) -> None:
        """Answer the request that arrives, if nothing was answered yet, and close the connection."""
        if self.transport.is_closing():
            return
        answerable = not self._head_complete or not self.cycle.response_started
        if self._begun and answerable:
            state = self.scope.get("state", {})
            state[GAVE_UP] = status
            body = json.dumps(error_body(status, message)).encode()
            head = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "connection: close",
            ]
            if "request_id" in state:
                head.append(f"x-request-id: {state['request_id'].said}")
            if status == 503:
                head.append("retry-after: 1")
            self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.close()
