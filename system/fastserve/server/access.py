"""Who may ask: the API key."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.responses import Response

from fastserve.server.body import BoundedRequest
from fastserve.server.errors import APIError, bad_request, describe

BEARER = HTTPBearer(auto_error=False, description="The key that the server was started with, if with one.")


async def authorize(http: Request) -> None:
    """Raise APIError 401 unless the request has the server's key, if there is one."""
    api_key = http.app.state.api_key
    if api_key is None:
        return
    given = await BEARER(http)
    # A header's bytes are read as Latin-1.
    if given is None or not hmac.compare_digest(given.credentials.encode("latin-1"), api_key.encode()):
        raise APIError(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key", headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


class KeyFirst(APIRoute):
    """A route that reads nothing of a request's body before its key, and no more of it than a request needs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI has it."""
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
