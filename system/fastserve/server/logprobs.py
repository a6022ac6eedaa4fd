"""Log probabilities as clients are told them: OpenAI's two forms, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastserve.core.logprobs import TokenLogprobs
from fastserve.server.text import TextCodec

_LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""


class ScoredToken(NamedTuple):
    """A token of a choice."""

    token_id: int
    offset: int
    """Characters of the choice's text before it."""
    logprobs: TokenLogprobs | None
    """None for a prompt's first token, which follows nothing."""


def of_completion(codec: TextCodec, tokens: Iterable[ScoredToken], num_top: int) -> dict[str, Any]:
    """The `logprobs` of a choice of /v1/completions: a column each for texts, logarithms, alternatives and places."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, offset, logprobs in tokens:
        text = codec.token_text(token_id)
        columns["tokens"].append(text)
        columns["text_offset"].append(offset)
        if logprobs is None:
            columns["token_logprobs"].append(None)
            columns["top_logprobs"].append(None)
            continue
        own = max(_LEAST, logprobs.logprob)
        top: dict[str, float] = {}
        for other, logprob in logprobs.top[:num_top]:  # Of tokens with one text, the likeliest counts.
            top.setdefault(codec.token_text(other), max(_LEAST, logprob))
        top.setdefault(text, own)
        columns["token_logprobs"].append(own)
        columns["top_logprobs"].append(top)
    return columns


def of_chat(codec: TextCodec, tokens: Iterable[ScoredToken], num_top: int) -> dict[str, Any]:
    """The `logprobs` of a choice of /v1/chat/completions: an object for every token."""
    content = []
    for token_id, _, logprobs in tokens:
        if logprobs is not None:
            top = [_chat_token(codec, other, logprob) for other, logprob in logprobs.top[:num_top]]
            content.append(_chat_token(codec, token_id, logprobs.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    text = codec.token_text(token_id)
    return {"token": text, "logprob": max(_LEAST, logprob), "bytes": list(codec.token_bytes(token_id))}


def of_prompt(codec: TextCodec, scored: Sequence[TokenLogprobs], num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for every prompt token it and the likeliest, by id; null for the first."""

    def one(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(_LEAST, logprob), "rank": rank, "decoded_token": codec.token_text(token_id)}

    found: list[dict[str, Any] | None] = [None]
    for token in scored:
        told = {str(token.token_id): one(token.token_id, token.logprob, token.rank)}
        for rank, (other, logprob) in enumerate(token.top[:num_top], 1):
            told.setdefault(str(other), one(other, logprob, rank))
        found.append(told)
    return found
