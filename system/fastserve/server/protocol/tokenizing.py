"""POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fastserve.server.protocol.chat import TEMPLATE_FIELDS, Messages
from fastserve.server.protocol.fields import Body, Neutral, Text, TokenId, field_error

MAX_TOKENS = 2**17
"""Tokens of one request to /detokenize: one call into the tokenizer, which holds up all streams for 80 ms."""


class TokenizeRequest(Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Whether to add special tokens, such as the one that begins a text. Left out: true for a text; false for a
    conversation, whose template writes them."""
    add_generation_prompt: bool = True
    """Whether a conversation ends where the assistant's answer begins."""
    return_token_strs: bool = False
    """Whether to return each token as the vocabulary writes it."""

    NEUTRAL: ClassVar[Neutral] = TEMPLATE_FIELDS

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "give either prompt, a text, or messages, a conversation")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
