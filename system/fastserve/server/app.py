"""The ASGI application: the routes over an engine's thread, and what stands before them."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from fastserve.server.access import BEARER
from fastserve.server.body_limit import BodyLimit
from fastserve.server.errors import install_error_handlers
from fastserve.server.options import ServerOptions
from fastserve.server.routes.openai import openai_routes
from fastserve.server.routes.operations import operation_routes, software_version
from fastserve.server.routes.page import page_routes
from fastserve.server.service import Server

__all__ = ["Server", "ServerOptions", "create_app"]


def create_app(server: Server) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="FastServe",
        version=software_version(),
        description="OpenAI-compatible; one model, one scheduling policy.",
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.state.api_key = server.options.api_key
    app.include_router(openai_routes(server), dependencies=[Depends(BEARER)])
    app.include_router(operation_routes(server))
    if server.options.page:
        app.include_router(page_routes(server))
    return app
