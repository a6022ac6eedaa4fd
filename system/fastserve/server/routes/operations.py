"""Routes for operators: health, version, load, metrics, caches."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

import fastserve
from fastserve.server.http.access import KeyFirst
from fastserve.server.http.errors import bad_request, json_response
from fastserve.server.monitoring.metrics import Health
from fastserve.server.routes.documented import ERRORS
from fastserve.server.service import Server

_UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"description": "Stopping, or the engine has failed or is stalled; the body says which, and why"}
}


def operation_routes(server: Server) -> APIRouter:
    """Return the routes for monitoring and orchestration; they require no key."""
    routes = APIRouter()

    @routes.get("/health", responses=_UNAVAILABLE)
    async def health() -> Response:
        """Say whether requests are taken."""
        if reason := server.reason:
            headers = {"retry-after": str(server.retry_after_s)}
            return json_response({"status": server.status, "reason": reason}, 503, headers)
        return json_response({"status": server.status})

    @routes.get("/ping", responses=_UNAVAILABLE)
    async def ping() -> Response:
        """As /health, under the name that SageMaker uses."""
        return await health()

    @routes.post("/ping", responses=_UNAVAILABLE)
    async def ping_posted() -> Response:
        """As /health."""
        return await health()

    @routes.get("/version")
    async def version_of_server() -> dict[str, str]:
        """Return the version of this software."""
        return {"version": fastserve.__version__}

    @routes.get("/load")
    async def load() -> dict[str, int]:
        """Return how many requests for completions are being answered."""
        return {"server_load": server.load.num_requests}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        snapshot = await server.state.read()
        health = Health(server.status == "stalled", server.engine.standstill_s)
        content = server.metrics.exposition(server.engine.model.name, snapshot.state, health)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def management_routes() -> APIRouter:
    """Return the routes that would change the server; they require the key."""
    routes = APIRouter(route_class=KeyFirst)

    @routes.post("/reset_prefix_cache", responses={400: ERRORS[400], 401: ERRORS[401]})
    async def reset_prefix_cache() -> Response:
        """Refused: this server has no prefix cache."""
        raise bad_request("this server has no prefix cache, so there is nothing to reset", code="no_prefix_cache")

    return routes
