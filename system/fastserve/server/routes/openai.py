"""OpenAI's interface: /v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastserve.server.answers.chat import ChatAnswer
from fastserve.server.answers.completion import CompletionAnswer
from fastserve.server.http.access import KeyFirst
from fastserve.server.protocol.chat import ChatCompletionRequest
from fastserve.server.protocol.completion import CompletionRequest
from fastserve.server.routes.documented import ERRORS, STREAMED
from fastserve.server.service import Server


def openai_routes(server: Server) -> APIRouter:
    """Return the routes of OpenAI's clients; they require the key."""
    routes = APIRouter(prefix="/v1", route_class=KeyFirst)
    model = server.engine.model

    @routes.post("/completions", responses=STREAMED, response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue one prompt or several."""
        server.require_model(body.model)
        server.require_ready(len(body.prompts) * body.n)
        token_ids = await server.prompts.tokens_of(body.prompts)
        names = ["prompt"] if len(body.prompts) == 1 else [f"prompt.{i}" for i in range(len(body.prompts))]
        prompts = [
            server.prompts.prompt(body, tokens, "max_tokens", name, given if isinstance(given, str) else None)
            for given, tokens, name in zip(body.prompts, token_ids, names, strict=True)
        ]
        server.require_ready(len(prompts) * body.n)
        return await server.respond(CompletionAnswer, body, prompts, http)

    @routes.post("/chat/completions", responses=STREAMED, response_model=None)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation, in the chat template of the model's tokenizer."""
        server.require_model(body.model)
        server.require_ready(body.n)
        token_ids = await server.prompts.tokens_of_chat([message.as_dict() for message in body.messages])
        prompt = server.prompts.prompt(body, token_ids, body.limit, "messages")
        server.require_ready(body.n)
        return await server.respond(ChatAnswer, body, [prompt], http)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": server.started_at,
            "owned_by": "fastserve",
            "root": model.name,
            "max_model_len": model.engine.longest_request,
            "vocab_size": model.vocab_size,
            "policy": model.policy,
        }

    @routes.get("/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """List the names of the served model."""
        return {"object": "list", "data": [card(name) for name in model.names]}

    @routes.get("/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model_card(name: str) -> dict[str, Any]:
        """Describe the model of that name."""
        server.require_model(name)
        return card(name)

    return routes
