"""The interface for people, at /docs: openapi.json as a page that needs no network."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from fastserve.server.routes.page import PAGE_POLICY


def docs_routes() -> APIRouter:
    """What the browser asks."""
    routes = APIRouter(include_in_schema=False)
    html = files("fastserve.server").joinpath("docs.html").read_text(encoding="utf-8")

    @routes.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(html, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})

    return routes
