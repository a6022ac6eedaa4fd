"""For those who operate the server: health, version, metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from starlette.responses import Response

from fastserve.server.errors import json_response
from fastserve.server.service import Server
from fastserve.server.state import engine_state


def operation_routes(server: Server) -> APIRouter:
    """What monitoring and orchestration ask; no key is needed."""
    routes = APIRouter()

    @routes.get("/health", responses={503: {"description": "Stopping, or the engine has failed"}})
    async def health() -> Response:
        """Whether requests are taken."""
        return json_response({"status": server.status}, 200 if server.status == "ready" else 503)

    @routes.get("/version")
    async def version_of_server() -> dict[str, str]:
        """The version of this software."""
        return {"version": software_version()}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        engine = server.engine
        state = await engine.call(lambda: engine_state(engine.model.engine))
        return Response(server.metrics.exposition(state), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def software_version() -> str:
    """Of the installed package."""
    try:
        return version("fastserve-repro")
    except PackageNotFoundError:  # A checkout on the path, not installed.
        return "0"
