"""The server: an engine's thread and the rules by which requests are taken, whatever the route."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Literal

from fastapi import Request
from starlette.responses import Response

from fastserve.server.completions import Answer, EventStream, Prompt, answer_unless_gone
from fastserve.server.engine_thread import EngineThread
from fastserve.server.errors import APIError, bad_request
from fastserve.server.metrics import ServerMetrics
from fastserve.server.options import ServerOptions
from fastserve.server.protocol import GenerationRequest
from fastserve.server.state import EngineView, RecentRequests
from fastserve.server.streams import StreamEnded

Status = Literal["ready", "draining", "failed", "stalled"]

COUNTED = "counted"
"""Key in a request's state: it is one of those that `load` counts."""
_TOKENIZED_AT_ONCE = 4096
"""Characters of a prompt up to which tokenizing is quicker than handing it to another thread."""


class Server:
    """An engine's thread and what the routes need beside it."""

    def __init__(self, options: ServerOptions, engine: EngineThread, metrics: ServerMetrics, recent: RecentRequests):
        self.options = options
        self.engine = engine
        self.metrics = metrics
        self.view = EngineView(engine, recent)
        self.load = 0
        """HTTP requests whose answers are being generated."""
        self.stop_by: float | None = None
        """Time on the monotonic clock until which the requests in progress may go on; None unless draining."""
        self.started_at = int(time.time())
        self._started = time.monotonic()

    @property
    def draining(self) -> bool:
        """Whether the server was told to stop and finishes what it has begun."""
        return self.stop_by is not None

    @property
    def status(self) -> Status:
        """Whether requests are taken, or what keeps the server from it."""
        if self.engine.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "stalled" if self.engine.standstill_s > self.options.stall_timeout_s else "ready"

    @property
    def reason(self) -> str:
        """Why no requests are taken; empty while they are."""
        match self.status:
            case "failed":
                return f"the engine has failed: {self.engine.failure}"
            case "draining":
                return "the server is stopping"
            case "stalled":
                return f"the engine is stalled: no iteration has ended for {self.engine.standstill_s:.0f} s"
        return ""

    @property
    def uptime_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def require_ready(self, num_requests: int) -> None:
        """Raise APIError unless so many more requests can be taken."""
        if reason := self.reason:
            raise self.unavailable(reason)
        limit, unfinished = self.options.max_requests, self.engine.num_unfinished
        if num_requests > limit:
            raise bad_request(f"{num_requests} prompts in one request; this server holds {limit} at most", "prompt")
        if unfinished + num_requests > limit:
            self.metrics.refused(num_requests)
            seconds = self.engine.retry_after_s(unfinished + num_requests - limit)
            raise APIError(
                429,
                f"the queue is full: {unfinished} of {limit} requests are unfinished; try again in {seconds} s",
                code="queue_full",
                headers={"retry-after": str(seconds)},
            )

    def unavailable(self, reason: str) -> APIError:
        """Status 503, with the time after which this server, or the next one at its address, is probably ready."""
        return APIError(503, reason, code=self.status, headers={"retry-after": str(self.retry_after_s)})

    @property
    def retry_after_s(self) -> int:
        """Seconds until requests are probably taken again: the queue's, when draining, and those to load the model."""
        seconds = self.engine.load_s
        if self.stop_by is not None and self.engine.error is None:
            left_s = max(0.0, self.stop_by - time.monotonic())
            seconds += min(left_s, self.engine.retry_after_s(self.engine.num_unfinished))
        return max(1, math.ceil(seconds))

    def require_model(self, name: str | None) -> None:
        """Raise APIError 404 unless the model of that name is served."""
        names = self.engine.model.names
        if name is not None and name not in names:
            known = ", ".join(map(repr, names))
            raise APIError(
                404, f"model {name!r} is not served here; this server has {known}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def prompt(self, body: GenerationRequest, token_ids: list[int], limit: str | None, param: str) -> Prompt:
        """What the engine is given. APIError 400 for a prompt that cannot be served.

        `limit` names the field that bounds the output; None: the output may be as long as there is room for. `param`
        names the field that the prompt came from.
        """
        model = self.engine.model
        if not token_ids:
            raise bad_request("an empty prompt: it needs at least one token", param)
        if model.vocab_size is not None and max(token_ids) >= model.vocab_size:
            raise bad_request(
                f"token id {max(token_ids)}: the model's vocabulary has ids from 0 to {model.vocab_size - 1}", param
            )
        longest = model.engine.longest_request
        max_tokens = max(1, longest - len(token_ids)) if limit is None else getattr(body, limit)
        if why := model.engine.why_never("refused", len(token_ids), max_tokens):
            # Clients look for how this begins.
            raise bad_request(
                f"This model's maximum context length is {longest} tokens: {why.removeprefix('request refused: ')}",
                limit if limit is not None and len(token_ids) < longest else param,
                "context_length_exceeded",
            )
        return Prompt(token_ids, body.sampling_params(max_tokens), model.codec.decoder(token_ids, body.stop_texts))

    async def tokens_of(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids."""
        if not isinstance(prompt, str):
            return prompt
        return await self._in_thread_if_long(len(prompt), lambda: self.engine.model.codec.encode(prompt))

    async def tokens_of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's token ids."""
        size = sum(len(message["content"]) for message in messages)
        return await self._in_thread_if_long(size, lambda: self.engine.model.codec.encode_chat(messages))

    async def respond(
        self, answer_class: type[Answer], body: GenerationRequest, prompts: list[Prompt], http: Request
    ) -> Response:
        """Whole, or as events."""
        answer = answer_class(body, self.engine, prompts, http.state.request_id)
        self.load += 1
        setattr(http.state, COUNTED, True)
        if body.stream:
            return EventStream(answer)
        try:
            response = await answer_unless_gone(answer, answer.whole(), http.receive)
        except StreamEnded as error:
            raise self.unavailable(str(error)) from error
        return response or Response(status_code=499)  # Nobody is there to read it.

    @staticmethod
    async def _in_thread_if_long(size: int, encode: Callable[[], list[int]]) -> list[int]:
        return encode() if size <= _TOKENIZED_AT_ONCE else await asyncio.to_thread(encode)
