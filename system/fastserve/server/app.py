"""The ASGI application: the routes, and what every request passes before them."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import fastserve
from fastserve.server.http.access import BEARER
from fastserve.server.http.errors import install_error_handlers
from fastserve.server.http.front import Front
from fastserve.server.http.hosts import AllowedHosts, names_for
from fastserve.server.routes.openai import openai_routes
from fastserve.server.routes.operations import management_routes, operation_routes
from fastserve.server.routes.pages import docs_routes, live_page_routes
from fastserve.server.routes.tokenizer import tokenizer_routes
from fastserve.server.service import Server

_EXPOSED_HEADERS = ("x-request-id", "retry-after")
"""Headers that pages of other origins may read."""


def create_app(server: Server) -> ASGIApp:
    """Return the ASGI application of `server`."""
    options = server.options
    api = FastAPI(
        title="FastServe",
        version=fastserve.__version__,
        description="OpenAI-compatible; one model, one scheduling policy.",
        # FastAPI's own pages load scripts from elsewhere.
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
        api.include_router(live_page_routes(server))
    app: ASGIApp = api
    if options.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    names = names_for(options.host) if options.allowed_hosts is None else options.allowed_hosts
    return Front(AllowedHosts(app, names), options.root_path, server.load, server.metrics.answered)
