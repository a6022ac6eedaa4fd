"""Log probabilities in the forms that clients know: OpenAI's two, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastserve.core.logprobs import TokenLogprobs
from fastserve.server.text.codec import TextCodec

_MIN_LOGPROB = -9999.0
"""Replaces the logarithm of 0, for which JSON has no number."""


class ScoredToken(NamedTuple):
    """A token of a choice with its log probability."""

    token_id: int
    offset: int
    """Characters of the choice's text before the token."""
    logprobs: TokenLogprobs | None
    """None for a prompt's first token, which has no tokens before it."""


def of_completion(codec: TextCodec, tokens: Iterable[ScoredToken], num_top: int) -> dict[str, Any]:
    """Return `logprobs` of a choice of /v1/completions: a column each for texts, values, alternatives and offsets."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, offset, logprobs in tokens:
        text = codec.token_text(token_id)
        columns["tokens"].append(text)
        columns["text_offset"].append(offset)
        if logprobs is None:
            columns["token_logprobs"].append(None)
            columns["top_logprobs"].append(None)
            continue
        own = max(_MIN_LOGPROB, logprobs.logprob)
        top: dict[str, float] = {}
        for other, logprob in logprobs.top[:num_top]:  # Of tokens with the same text, the likeliest counts.
            top.setdefault(codec.token_text(other), max(_MIN_LOGPROB, logprob))
        top.setdefault(text, own)
        columns["token_logprobs"].append(own)
        columns["top_logprobs"].append(top)
    return columns


def of_chat(codec: TextCodec, tokens: Iterable[ScoredToken], num_top: int) -> dict[str, Any]:
    """Return `logprobs` of a choice of /v1/chat/completions: an object for every token."""
    content = []
    for token_id, _, logprobs in tokens:
        if logprobs is not None:
            top = [_chat_token(codec, other, logprob) for other, logprob in logprobs.top[:num_top]]
            content.append(_chat_token(codec, token_id, logprobs.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    text = codec.token_text(token_id)
    return {"token": text, "logprob": max(_MIN_LOGPROB, logprob), "bytes": list(codec.token_bytes(token_id))}


def of_prompt(codec: TextCodec, scored: Sequence[TokenLogprobs], num_top: int) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each prompt token, by id, itself and the likeliest; null for the first."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(_MIN_LOGPROB, logprob), "rank": rank, "decoded_token": codec.token_text(token_id)}

    entries: list[dict[str, Any] | None] = [None]
    for token in scored:
        by_id = {str(token.token_id): entry(token.token_id, token.logprob, token.rank)}
        for rank, (other, logprob) in enumerate(token.top[:num_top], 1):
            by_id.setdefault(str(other), entry(other, logprob, rank))
        entries.append(by_id)
    return entries
