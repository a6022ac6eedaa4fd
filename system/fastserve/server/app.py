"""The ASGI application: the routes over an engine's thread, and what stands before them."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from fastserve.server.access import BEARER
from fastserve.server.errors import install_error_handlers
from fastserve.server.front import Front
from fastserve.server.hosts import AllowedHosts, names_for
from fastserve.server.options import ServerOptions
from fastserve.server.routes.docs import docs_routes
from fastserve.server.routes.openai import openai_routes
from fastserve.server.routes.operations import management_routes, operation_routes
from fastserve.server.routes.page import page_routes
from fastserve.server.routes.tokenizer import tokenizer_routes
from fastserve.server.service import Server
from fastserve.server.version import software_version

__all__ = ["Server", "ServerOptions", "create_app"]

_SHOWN_TO_OTHER_ORIGINS = ("x-request-id", "retry-after")


def create_app(server: Server) -> ASGIApp:
    """The ASGI application."""
    options = server.options
    api = FastAPI(
        title="FastServe",
        version=software_version(),
        description="OpenAI-compatible; one model, one scheduling policy.",
        # FastAPI's own are loaded from a content network.
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(api)
    api.state.api_key = options.api_key
    api.state.bodies = server.bodies
    api.include_router(openai_routes(server), dependencies=[Depends(BEARER)])
    api.include_router(tokenizer_routes(server), dependencies=[Depends(BEARER)])
    api.include_router(management_routes(), dependencies=[Depends(BEARER)])
    api.include_router(operation_routes(server))
    api.include_router(docs_routes())
    if options.page:
        api.include_router(page_routes(server))
    app: ASGIApp = api
    if options.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_SHOWN_TO_OTHER_ORIGINS,
        )
    names = names_for(options.host) if options.allowed_hosts is None else options.allowed_hosts
    return Front(AllowedHosts(app, names), server)
