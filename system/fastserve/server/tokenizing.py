"""What clients send to /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fastserve.server.protocol import MAX_MESSAGES, OF_TEMPLATE, Body, ChatMessage, Neutral, Text, TokenId, field_error

MAX_TOKENS = 2**17
"""Of one request: their text is one call into the tokenizer, which keeps all streams waiting, for 80 ms if so many."""


class TokenizeRequest(Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Such as the one that begins a text. Left out: yes for a text; no for a conversation, whose template has them."""
    add_generation_prompt: bool = True
    """Whether a conversation ends where the assistant is to speak."""
    return_token_strs: bool = False
    """Whether the answer has each token as the vocabulary writes it."""

    NEUTRAL: ClassVar[Neutral] = OF_TEMPLATE

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "give either prompt, a text, or messages, a conversation")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
