"""Requests that do not arrive whole: they have a limited time, and none once the server stops.

Without a limit a client that sends half a request holds its connection for ever, and the server could not end. The
head has a limited size, too: httptools keeps all of it and copies a long header again with each piece.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastserve.server.http.errors import error_body
from fastserve.server.http.front import GAVE_UP


def http_protocol(receive_timeout_s: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol for HTTP/1.1 with a time in which a request's head and body must arrive."""

    class Protocol(_ArrivingInTime):
        _receive_timeout_s = receive_timeout_s

    return Protocol


_MAX_HEAD_BYTES = 65_536
"""Of a request's first line, its headers, and its trailers."""


class _ArrivingInTime(HttpToolsProtocol):
    _receive_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        """Runs from the start of the connection, or the first byte of a request, to the request's last byte."""
        self._begun = self._head_complete = False
        """Whether the request that is arriving has begun, and whether its head is complete."""
        self._num_head_bytes = self._num_header_bytes = 0
        """Bytes of that request's head before its last piece, and bytes of its headers."""

    # -- called by asyncio, httptools and uvicorn ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        self._start_timer()
        head_is_unfinished = self._begun and not self._head_complete
        super().data_received(data)
        if head_is_unfinished and not self._head_complete:
            self._num_head_bytes += len(data)
        if max(self._num_head_bytes, self._num_header_bytes) > _MAX_HEAD_BYTES:
            self._refuse(431, f"the request's URL and headers are longer than {_MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._start_timer()
        self._begun, self._head_complete = True, False
        self._num_head_bytes = self._num_header_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value) + 4
        if self._num_header_bytes <= _MAX_HEAD_BYTES:
            super().on_header(name, value)

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
        if self._is_answering_another():  # Reading is paused meanwhile.
            self._start_timer()
        else:
            self._refuse(408, f"the request did not arrive whole within {self._receive_timeout_s:g} s")

    def _is_answering_another(self) -> bool:
        """Whether an earlier request on the same connection is still being answered."""
        earlier = not self._head_complete and self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or earlier

    def _refuse(self, status: int, message: str) -> None:
        """Answer the request that is arriving, unless its answer has begun, and close the connection."""
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
