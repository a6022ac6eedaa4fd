"""The served model's tokenizer: /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fastserve.server.http.access import KeyFirst
from fastserve.server.http.errors import json_response
from fastserve.server.protocol.tokenizing import DetokenizeRequest, TokenizeRequest
from fastserve.server.routes.documented import ERRORS, INVALID
from fastserve.server.service import Server

_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (400, 401, 404, 413, 503)},
    **INVALID,
}


def tokenizer_routes(server: Server) -> APIRouter:
    """Return the routes for clients that count tokens; they require the key."""
    routes = APIRouter(route_class=KeyFirst)
    model, prompts = server.engine.model, server.prompts

    @routes.post("/tokenize", responses=_RESPONSES, response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a text or a conversation."""
        server.require_model(body.model)
        if body.messages is not None:
            messages = [message.as_dict() for message in body.messages]
            special = bool(body.add_special_tokens)
            tokens = await prompts.tokens_of_chat(messages, body.add_generation_prompt, special)
        else:
            assert body.prompt is not None
            (tokens,) = await prompts.tokens_of([body.prompt], body.add_special_tokens is not False)
        answer = {
            "count": len(tokens),
            "max_model_len": model.engine.longest_request,
            "tokens": tokens,
            "token_strs": await prompts.names_of(tokens) if body.return_token_strs else None,
        }
        return json_response(answer)

    @routes.post("/detokenize", responses=_RESPONSES, response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens, special ones included."""
        server.require_model(body.model)
        prompts.require_known(body.tokens, "tokens")
        return json_response({"prompt": await prompts.text_of(body.tokens)})

    return routes
