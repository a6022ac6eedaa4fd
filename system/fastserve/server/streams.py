"""What the engine's thread hands to the event loop: the tokens of each request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

from fastserve.core.errors import FastServeError
from fastserve.core.logprobs import TokenLogprobs
from fastserve.core.request import RequestStatus
from fastserve.engine import Job

FinishReason = Literal["length", "stop", "abort", "error"]


class Token(NamedTuple):
    """A generated token, and how the output ended if it was the last."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    """Of requests that ask for it."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """With the first token of requests that ask for it: of the prompt's tokens from the second on."""


def token_of(job: Job, token_id: int, finish_reason: FinishReason | None) -> Token:
    """The newest token of a request, with what is told of it."""
    known = job.logprobs
    if known is None:
        return Token(token_id, finish_reason)
    is_first = job.request.num_output_tokens == 1
    return Token(token_id, finish_reason, known.tokens[-1] if known.tokens else None, known.prompt if is_first else ())


def finish_reason(job: Job) -> FinishReason:
    """How a request ended that has left the engine."""
    if job.request.status is RequestStatus.FINISHED:
        return "stop" if job.request.token_ids[-1] in job.stop_token_ids else "length"
    return "abort" if job.request.status is RequestStatus.ABORTED else "error"


class StreamEnded(FastServeError):
    """A request left the engine before its last token; says why."""


class TokenStream:
    """The tokens of one request, from the engine's thread to the coroutine that sends them.

    All but the request's id and length belong to the event loop. It holds at most the request's `max_tokens`, so a
    client that reads slowly keeps nobody waiting.
    """

    def __init__(self, request_id: str, max_tokens: int) -> None:
        self.request_id = request_id
        self.max_tokens = max_tokens
        self._tokens: list[Token] = []
        self._error: StreamEnded | None = None
        self._news = asyncio.Event()

    def put(self, token: Token) -> None:
        """A token has come."""
        self._tokens.append(token)
        self._news.set()

    def fail(self, reason: str) -> None:
        """No more tokens will come, for this reason."""
        self._error = StreamEnded(reason)
        self._news.set()

    async def batches(self) -> AsyncIterator[list[Token]]:
        """All tokens that have come since the last time, each once, up to the last. Raises StreamEnded if it fails."""
        while True:
            await self._news.wait()
            self._news.clear()
            tokens, self._tokens = self._tokens, []
            if tokens:
                yield tokens
                if tokens[-1].finish_reason is not None:
                    return
            if self._error is not None:
                raise self._error
