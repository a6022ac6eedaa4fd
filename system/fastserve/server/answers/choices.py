"""The choices of an answer, and the pieces of text and tokens that they grow by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fastserve.core.logprobs import TokenLogprobs
from fastserve.core.request import SamplingParams
from fastserve.server.answers.logprobs import ScoredToken
from fastserve.server.engine.streams import FinishReason, Token, TokenStream
from fastserve.server.text.detokenizer import Detokenizer

T = TypeVar("T")


class Prompt(NamedTuple):
    """The input of one or several choices."""

    token_ids: Sequence[int]
    params: SamplingParams
    detokenizers: Sequence[Detokenizer]
    """One for each of `params.n` choices."""
    text: str | None
    """The prompt as it was sent; None if it was sent as token ids or is truncated."""


@dataclass(slots=True)
class Choice:
    """One output on its way to the client."""

    index: int
    stream: TokenStream
    detokenizer: Detokenizer
    stop_token_ids: frozenset[int]
    """Stop tokens that the client gave, without the model's own ends of sequence."""
    prompt: Prompt
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on; known with the first generated token."""
    num_echoed: int = 0
    """Characters of the prompt that the choice's text begins with."""
    has_begun: bool = False

    def piece(self, token: Token, include_stop: bool) -> Piece:
        """Return what `token` adds. With `include_stop` a token that ends the output has its text, else none."""
        detokenizer, reason = self.detokenizer, token.finish_reason
        offset = self.num_echoed + detokenizer.num_characters
        text = "" if reason == "stop" and not include_stop else detokenizer.add(token.token_id)
        if reason is not None:
            text += detokenizer.end()
        stop_reason: str | int | None = None
        if detokenizer.stopped:
            reason, stop_reason = "stop", detokenizer.stop_text
        elif reason == "stop" and token.token_id in self.stop_token_ids:
            stop_reason = token.token_id
        scored = () if token.logprobs is None else (ScoredToken(token.token_id, offset, token.logprobs),)
        return Piece(self.index, text, (token.token_id,), reason, stop_reason, 1, scored)


class Piece(NamedTuple):
    """What a token adds to a choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """The client's stop text or stop token that ended the choice."""
    num_generated: int = 1
    """How many of the tokens were generated; others are of an echoed prompt."""
    scored: tuple[ScoredToken, ...] = ()
    """The tokens with log probabilities, if the request asks for them."""


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T, None]:
    """Yield the items of all `sources` as they come. Raises the first error of any once all have ended."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield item
        return
    queue: asyncio.Queue[tuple[T] | None] = asyncio.Queue()

    async def feed(source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                queue.put_nowait((item,))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(feed(source)) for source in sources]
    try:
        num_left = len(tasks)
        while num_left:
            entry = await queue.get()
            if entry is None:
                num_left -= 1
            else:
                yield entry[0]
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
