"""The API key."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.responses import Response

from fastserve.server.http.body import BoundedRequest
from fastserve.server.http.errors import APIError, bad_request, describe

BEARER = HTTPBearer(auto_error=False, description="The server's API key, if it has one.")


async def authorize(http: Request) -> None:
    """Raise APIError 401 unless the request has the server's key or the server has none."""
    api_key = http.app.state.api_key
    if api_key is None:
        return
    given = await BEARER(http)
    # Starlette decodes headers as Latin-1.
    if given is None or not hmac.compare_digest(given.credentials.encode("latin-1"), api_key.encode()):
        raise APIError(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key", headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


class KeyFirst(APIRoute):
    """A route that checks the key before it reads the body, and reads the body within bounds."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind the check."""
        handle = super().get_route_handler()

        async def authorized(http: Request) -> Response:
            await authorize(http)
            try:
                return await handle(BoundedRequest(http, self._validated))
            finally:
                http.app.state.bodies.release(http)

        return authorized

    def _validated(self, value: Any) -> Any:
        assert self.body_field is not None
        body, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise bad_request(*describe(errors[0]))
        return body
