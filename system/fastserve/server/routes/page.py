"""The live page and its data."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Depends
from starlette.responses import HTMLResponse, Response

from fastserve.server.access import authorize
from fastserve.server.errors import json_response
from fastserve.server.latencies import summarize
from fastserve.server.service import Server

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_routes(server: Server) -> APIRouter:
    """What the browser asks."""
    routes = APIRouter(include_in_schema=False)
    html = files("fastserve.server").joinpath("page.html").read_text(encoding="utf-8")

    @routes.get("/")
    async def page() -> Response:
        return HTMLResponse(html, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})

    @routes.get("/page/state", dependencies=[Depends(authorize)])
    async def state() -> Response:
        engine = server.engine
        view = await server.view.look()
        about = {
            "model": engine.model.name,
            "policy": engine.model.policy,
            "status": server.status,
            "error": server.reason if server.status in ("failed", "stalled") else "",
            "uptime_s": server.uptime_s,
        }
        latencies = {name: summarize(values) for name, values in view.latencies.items()}
        return json_response(
            {
                **about,
                **view.state,
                "totals": view.totals,
                "recent": view.recent,
                "last_minute": latencies,
            },
            headers={"cache-control": "no-store"},
        )

    return routes
