"""Streams of tokens from the engine's thread to the event loop, one for each request."""

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
    """A generated token."""

    token_id: int
    finish_reason: FinishReason | None
    """Why the output ended; None unless the token is its last."""
    logprobs: TokenLogprobs | None = None
    """None unless the request asks for log probabilities."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on, with the first token of a request that asks for them."""


def token_of(job: Job, token_id: int, finish_reason: FinishReason | None) -> Token:
    """Return a job's newest token, with its log probabilities."""
    known = job.logprobs
    if known is None:
        return Token(token_id, finish_reason)
    is_first = job.request.num_output_tokens == 1
    return Token(token_id, finish_reason, known.tokens[-1] if known.tokens else None, known.prompt if is_first else ())


def finish_reason(job: Job) -> FinishReason:
    """Return why a job ended that has left the engine."""
    if job.request.status is RequestStatus.FINISHED:
        return "stop" if job.request.token_ids[-1] in job.stop_token_ids else "length"
    return "abort" if job.request.status is RequestStatus.ABORTED else "error"


class StreamEnded(FastServeError):
    """A request left the engine before its last token, for the reason that the message says."""


class TokenStream:
    """The tokens of one request, from the engine's thread to the coroutine that sends them.

    The engine's thread reads only `request_id` and `max_tokens`; all else belongs to the event loop. A stream holds at
    most `max_tokens` tokens, so a client that reads slowly holds up nothing.
    """

    def __init__(self, request_id: str, max_tokens: int) -> None:
        self.request_id = request_id
        self.max_tokens = max_tokens
        self._tokens: list[Token] = []
        self._error: StreamEnded | None = None
        self._changed = asyncio.Event()

    def put(self, token: Token) -> None:
        """Add a token."""
        self._tokens.append(token)
        self._changed.set()

    def fail(self, reason: str) -> None:
        """End the stream with an error."""
        self._error = StreamEnded(reason)
        self._changed.set()

    async def batches(self) -> AsyncIterator[list[Token]]:
        """Yield the tokens that came since the last batch, up to the last token. Raises StreamEnded on failure."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            tokens, self._tokens = self._tokens, []
            if tokens:
                yield tokens
                if tokens[-1].finish_reason is not None:
                    return
            if self._error is not None:
                raise self._error
