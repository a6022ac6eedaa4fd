"""The largest body of a request."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.server.errors import APIError

_LARGEST_BODY = 32 * 2**20


class BodyLimit:
    """Refuses bodies that no prompt needs, before they fill the memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _LARGEST_BODY:
                raise APIError(413, f"the body is larger than {_LARGEST_BODY // 2**20} MiB")
            return message

        await self._app(scope, limited, send)
