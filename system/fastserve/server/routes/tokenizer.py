"""The served model's tokenizer: /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fastserve.server.access import KeyFirst
from fastserve.server.errors import json_response
from fastserve.server.routes.documented import ERRORS
from fastserve.server.service import Server
from fastserve.server.tokenizing import DetokenizeRequest, TokenizeRequest

_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (400, 401, 404, 413, 503)},
    422: {**ERRORS[400], "description": "Not used: what is invalid is answered 400"},
}


def tokenizer_routes(server: Server) -> APIRouter:
    """What clients ask who count tokens; the key is needed."""
    routes = APIRouter(route_class=KeyFirst)
    model = server.engine.model

    @routes.post("/tokenize", responses=_RESPONSES, response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text or a conversation."""
        server.require_model(body.model)
        if body.messages is not None:
            messages = [message.as_dict() for message in body.messages]
            special = bool(body.add_special_tokens)
            tokens = await server.tokens_of_chat(messages, body.add_generation_prompt, special)
        else:
            assert body.prompt is not None
            (tokens,) = await server.tokens_of([body.prompt], body.add_special_tokens is not False)
        answer = {
            "count": len(tokens),
            "max_model_len": model.engine.longest_request,
            "tokens": tokens,
            "token_strs": await server.names_of(tokens) if body.return_token_strs else None,
        }
        return json_response(answer)

    @routes.post("/detokenize", responses=_RESPONSES, response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens, special ones too."""
        server.require_model(body.model)
        server.require_known(body.tokens, "tokens")
        return json_response({"prompt": await server.text_of(body.tokens)})

    return routes
