"""Sending an answer, until the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.server.answers.answer import Answer

T = TypeVar("T")


class EventStream(Response):
    """Sends an answer's events as they come, and closes the answer if the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        await unless_disconnected(self._answer, self._send(send), receive)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._answer.events()) as events:
            async for chunk in events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(answer: Answer, work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """Return what `work` returns, or None if the client disconnects before. Closes the answer in either case."""
    working = asyncio.create_task(work)
    disconnected = asyncio.create_task(_wait_until_disconnected(receive))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        answer.close()
        for task in (working, disconnected):
            task.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
