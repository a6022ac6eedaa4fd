"""The routes: OpenAI's interface over an engine's thread, health, metrics, and the live page."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.config import require_int, require_positive
from fastserve.server.completions import Answer, ChatAnswer, EventStream, Prompt, TextAnswer, answer_unless_gone
from fastserve.server.engine_thread import EngineThread
from fastserve.server.errors import APIError, bad_request, install_error_handlers, json_response
from fastserve.server.metrics import ServerMetrics
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fastserve.server.state import RecentRequests, engine_state
from fastserve.server.streams import StreamEnded

_TOKENIZED_AT_ONCE = 4096
"""Characters of a prompt up to which tokenizing is quicker than handing it to another thread."""
_LARGEST_BODY = 32 * 2**20
_BEARER = HTTPBearer(auto_error=False, description="The key that the server was started with, if with one.")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves, whatever it serves."""

    api_key: str | None = None
    """What /v1 and the live page's data ask for; None: nothing."""
    max_requests: int = 10_000
    """Unfinished requests it holds; those beyond are answered 429."""
    page: bool = True
    """Whether there is a live page."""
    drain_timeout_s: float = 30.0
    """How long it finishes what it has begun when it is told to stop."""

    def __post_init__(self) -> None:
        require_int("max_requests", self.max_requests, 1)
        require_positive("drain_timeout_s", self.drain_timeout_s)


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request cannot be served as it is"},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong"},
    404: {"model": ErrorAnswer, "description": "There is no such model"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After says when to come again"},
    503: {"model": ErrorAnswer, "description": "The server is stopping, or its engine has failed"},
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {
        "description": "The answer, or with stream: true its events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    422: {"model": ErrorAnswer, "description": "Not used: what is invalid is answered 400"},
}


class Server:
    """An engine's thread and what the routes need beside it."""

    def __init__(self, options: ServerOptions, engine: EngineThread, metrics: ServerMetrics, recent: RecentRequests):
        self.options = options
        self.engine = engine
        self.metrics = metrics
        self.recent = recent
        self.draining = False
        self.started_at = int(time.time())
        self._started = time.monotonic()

    @property
    def status(self) -> str:
        """`ready`, `draining` or `failed`."""
        return "failed" if self.engine.error is not None else "draining" if self.draining else "ready"

    @property
    def uptime_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def require_ready(self, num_requests: int) -> None:
        """Raise APIError unless so many more requests can be taken."""
        if self.status != "ready":
            why = f"the engine has failed: {self.engine.error}" if self.engine.error else "the server is stopping"
            raise APIError(503, why, code=self.status, headers={"retry-after": "10"})
        limit, unfinished = self.options.max_requests, self.engine.num_unfinished
        if num_requests > limit:
            raise bad_request(f"{num_requests} prompts in one request; this server holds {limit} at most", "prompt")
        if unfinished + num_requests > limit:
            self.metrics.refused(num_requests)
            seconds = self.engine.retry_after_s(unfinished + num_requests - limit)
            raise APIError(
                429,
                f"the queue is full: {unfinished} of {limit} requests are unfinished; try again in {seconds} s",
                code="queue_full",
                headers={"retry-after": str(seconds)},
            )

    def require_model(self, name: str | None) -> None:
        """Raise APIError 404 unless the model of that name is served."""
        if name is not None and name != self.engine.model.name:
            raise APIError(
                404, f"model {name!r} is not served here; this server has {self.engine.model.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def prompt(self, body: GenerationRequest, token_ids: list[int], max_tokens: int | None) -> Prompt:
        """What the engine is given. APIError 400 for a prompt that cannot be served; without `max_tokens`, as many as
        there is room for."""
        model = self.engine.model
        if not token_ids:
            raise bad_request("an empty prompt: it needs at least one token", "prompt")
        if model.vocab_size is not None and max(token_ids) >= model.vocab_size:
            raise bad_request(
                f"token id {max(token_ids)}: the model's vocabulary has ids from 0 to {model.vocab_size - 1}", "prompt"
            )
        if max_tokens is None:
            max_tokens = max(1, model.engine.longest_request - len(token_ids))
        if why := model.engine.why_never("refused", len(token_ids), max_tokens):
            raise bad_request(why.removeprefix("request refused: "), "max_tokens", "context_length_exceeded")
        return Prompt(token_ids, body.sampling_params(max_tokens), model.codec.decoder(token_ids, body.stop_texts))

    async def tokens_of(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids."""
        if not isinstance(prompt, str):
            return prompt
        return await self._in_thread_if_long(len(prompt), lambda: self.engine.model.codec.encode(prompt))

    async def tokens_of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's token ids."""
        size = sum(len(message["content"]) for message in messages)
        return await self._in_thread_if_long(size, lambda: self.engine.model.codec.encode_chat(messages))

    async def respond(
        self, answer_class: type[Answer], body: GenerationRequest, prompts: list[Prompt], http: Request
    ) -> Response:
        """Whole, or as events."""
        answer = answer_class(body, self.engine, prompts)
        if body.stream:
            return EventStream(answer)
        try:
            response = await answer_unless_gone(answer, answer.whole(), http.receive)
        except StreamEnded as error:
            raise APIError(503, str(error), code=self.status) from error
        return response or Response(status_code=499)  # Nobody is there to read it.

    @staticmethod
    async def _in_thread_if_long(size: int, encode: Callable[[], list[int]]) -> list[int]:
        return encode() if size <= _TOKENIZED_AT_ONCE else await asyncio.to_thread(encode)


def create_app(server: Server) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="FastServe", version=_version(), description="OpenAI-compatible; one model, one scheduling policy."
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.state.api_key = server.options.api_key
    app.include_router(_openai_routes(server), dependencies=[Depends(_BEARER)])
    app.include_router(_operation_routes(server))
    if server.options.page:
        app.include_router(_page_routes(server))
    return app


def _openai_routes(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", route_class=_KeyFirst)
    model = server.engine.model

    @routes.post("/completions", responses=_STREAMED, response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue one prompt or several."""
        server.require_model(body.model)
        body.require_supported()
        server.require_ready(len(body.prompts))
        prompts = [server.prompt(body, await server.tokens_of(prompt), body.max_tokens) for prompt in body.prompts]
        server.require_ready(len(prompts))
        return await server.respond(TextAnswer, body, prompts, http)

    @routes.post("/chat/completions", responses=_STREAMED, response_model=None)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation, in the chat template of the model's tokenizer."""
        server.require_model(body.model)
        body.require_supported()
        server.require_ready(1)
        token_ids = await server.tokens_of_chat([message.as_dict() for message in body.messages])
        prompt = server.prompt(body, token_ids, body.max_completion_tokens or body.max_tokens)
        server.require_ready(1)
        return await server.respond(ChatAnswer, body, [prompt], http)

    def card() -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": server.started_at,
            "owned_by": "fastserve",
            "root": model.name,
            "max_model_len": model.engine.longest_request,
            "vocab_size": model.vocab_size,
            "policy": model.policy,
        }

    @routes.get("/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [card()]}

    @routes.get("/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def model_card(name: str) -> dict[str, Any]:
        """The model of that name."""
        server.require_model(name)
        return card()

    return routes


def _operation_routes(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", responses={503: {"description": "Stopping, or the engine has failed"}})
    async def health() -> Response:
        """Whether requests are taken."""
        return json_response({"status": server.status}, 200 if server.status == "ready" else 503)

    @routes.get("/version")
    async def server_version() -> dict[str, str]:
        """The version of this software."""
        return {"version": _version()}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        engine = server.engine
        state = await engine.call(lambda: engine_state(engine.model.engine))
        return Response(server.metrics.exposition(state), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _page_routes(server: Server) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    html = files("fastserve.server").joinpath("page.html").read_text(encoding="utf-8")

    @routes.get("/")
    async def page() -> Response:
        return HTMLResponse(html, headers={"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"})

    @routes.get("/page/state", dependencies=[Depends(_authorize)])
    async def state() -> Response:
        engine = server.engine
        standing, totals, recent = await engine.call(
            lambda: (engine_state(engine.model.engine), dict(server.metrics.totals), server.recent.rows())
        )
        about = {
            "model": engine.model.name,
            "policy": engine.model.policy,
            "status": server.status,
            "error": str(engine.error or ""),
            "uptime_s": server.uptime_s,
        }
        return json_response(
            {**about, **standing, "totals": totals, "recent": recent},
            headers={"cache-control": "no-store"},
        )

    return routes


async def _authorize(http: Request) -> None:
    """Raise APIError 401 unless the request has the server's key, if there is one."""
    api_key = http.app.state.api_key
    if api_key is None:
        return
    given = await _BEARER(http)
    # A header's bytes are read as Latin-1.
    if given is None or not hmac.compare_digest(given.credentials.encode("latin-1"), api_key.encode()):
        raise APIError(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key", headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


class _KeyFirst(APIRoute):
    """A route that reads nothing of a request's body before its key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI has it."""
        handle = super().get_route_handler()

        async def authorized(http: Request) -> Response:
            await _authorize(http)
            return await handle(http)

        return authorized


class BodyLimit:
    """Refuses bodies that no prompt needs, before they fill the memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _LARGEST_BODY:
                raise APIError(413, f"the body is larger than {_LARGEST_BODY // 2**20} MiB")
            return message

        await self._app(scope, limited, send)


def _version() -> str:
    try:
        return version("fastserve-repro")
    except PackageNotFoundError:  # A checkout on the path, not installed.
        return "0"
