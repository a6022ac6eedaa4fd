"""The live page with its data, and the interface at /docs."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import Response

from fastserve.server.http.access import authorize
from fastserve.server.http.errors import json_response
from fastserve.server.monitoring.latencies import summarize
from fastserve.server.pages import document, page_response
from fastserve.server.service import Server


def docs_routes() -> APIRouter:
    """Return the route of /docs: openapi.json as a page that needs no network."""
    routes = APIRouter(include_in_schema=False)
    text = document("docs")

    @routes.get("/docs")
    async def docs() -> Response:
        return page_response(text)

    return routes


def live_page_routes(server: Server) -> APIRouter:
    """Return the routes of the live page and of its data."""
    routes = APIRouter(include_in_schema=False)
    text = document("page")

    @routes.get("/")
    async def page() -> Response:
        return page_response(text)

    @routes.get("/page/state", dependencies=[Depends(authorize)])
    async def state() -> Response:
        engine = server.engine
        snapshot = await server.state.read()
        about = {
            "model": engine.model.name,
            "policy": engine.model.policy,
            "status": server.status,
            "error": server.reason if server.status in ("failed", "stalled") else "",
            "uptime_s": server.uptime_s,
        }
        latencies = {name: summarize(values) for name, values in snapshot.latencies.items()}
        return json_response(
            {
                **about,
                **snapshot.state,
                "totals": snapshot.totals,
                "recent": snapshot.recent,
                "last_minute": latencies,
            },
            headers={"cache-control": "no-store"},
        )

    return routes
