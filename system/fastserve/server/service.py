"""The server: an engine's thread and the rules by which requests are taken, whatever the route."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from fastapi import Request
from starlette.responses import Response

from fastserve.engine import NO_LOGPROBS
from fastserve.server.body import Bodies, BodyLimits
from fastserve.server.completions import Answer, EventStream, Prompt, answer_unless_gone
from fastserve.server.engine_thread import EngineThread
from fastserve.server.errors import APIError, bad_request, shown
from fastserve.server.metrics import ServerMetrics
from fastserve.server.offload import Offload
from fastserve.server.options import ServerOptions
from fastserve.server.protocol import MAX_PROMPT_SCORES, GenerationRequest
from fastserve.server.state import EngineView, RecentRequests
from fastserve.server.streams import StreamEnded

Status = Literal["ready", "draining", "failed", "stalled"]

COUNTED = "counted"
"""Key in a request's state: it is one of those that `load` counts."""
_TOKENIZE_S_A_CHARACTER = 1.3e-6
_CHARACTERS_A_MESSAGE = 30
"""What it costs to write a message in a chat template, in characters tokenized."""

T = TypeVar("T")


class Server:
    """An engine's thread and what the routes need beside it."""

    def __init__(self, options: ServerOptions, engine: EngineThread, metrics: ServerMetrics, recent: RecentRequests):
        self.options = options
        self.engine = engine
        self.metrics = metrics
        self.view = EngineView(engine, metrics.totals, recent)
        self.offload = Offload()
        self.bodies = Bodies(BodyLimits.of_context(engine.model.engine.longest_request), self.offload)
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
            raise bad_request(f"{num_requests} choices in one request; this server takes {limit} at most", "prompt")
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
                404, f"model {shown(name)} is not served here; this server has {known}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def prompt(
        self, body: GenerationRequest, token_ids: list[int], limit: str | None, param: str, text: str | None = None
    ) -> Prompt:
        """What the engine is given. APIError 400 for a prompt that cannot be served.

        `limit` names the field that bounds the output; None: the output may be as long as there is room for. `param`
        names the field that the prompt came from; `text` is the prompt, if it came as that.
        """
        model = self.engine.model
        longest = model.engine.longest_request
        if (most := body.truncate_prompt_tokens) is not None:
            if most < 0:
                most = max(1, longest - (1 if limit is None else max(1, getattr(body, limit))))
            if len(token_ids) > most:
                token_ids, text = token_ids[-most:], None
        if not token_ids:
            raise bad_request("an empty prompt: it needs at least one token", param)
        self.require_known(token_ids, param)
        if limit is None:
            room = max(1, longest - len(token_ids))
            max_tokens = min(room, model.generation_config.max_new_tokens or room)
        else:  # To echo a prompt alone it is computed, and a token after it.
            max_tokens = max(1, getattr(body, limit))
        if why := model.engine.rejection_reason("refused", len(token_ids), max_tokens):
            # Clients look for how this begins.
            raise bad_request(
                f"This model's maximum context length is {longest} tokens: {why.removeprefix('request refused: ')}",
                limit if limit is not None and len(token_ids) < longest else param,
                "context_length_exceeded",
            )
        if body.min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens={body.min_tokens} is more than the {max_tokens} tokens of output at most", "min_tokens"
            )
        params = body.sampling_params(max_tokens, model.generation_config.sampling)
        if params.asks_logprobs and not model.engine.executor.has_logits:
            raise bad_request(NO_LOGPROBS, "logprobs" if params.logprobs is not None else "prompt_logprobs")
        if conflict := params.conflict(model.vocab_size, model.engine.eos_token_ids):
            raise bad_request(conflict[1], conflict[0])
        detokenizers = [
            model.codec.decoder(
                token_ids, body.stop_texts, include_stop=body.include_stop_str_in_output, min_tokens=body.min_tokens
            )
            for _ in range(body.n)
        ]
        return Prompt(token_ids, params, detokenizers, text)

    def require_bounded(self, prompts: Sequence[Prompt]) -> None:
        """Raise APIError 400 if the outputs asked for need more prompt tokens, or more log probabilities of such, than
        one request may have."""
        num_tokens = sum(len(prompt.token_ids) * prompt.params.n for prompt in prompts)
        most = self.bodies.limits.num_values
        if num_tokens > most:
            raise bad_request(
                f"{num_tokens} prompt tokens, counted for each of the n outputs, are more than {most}; lower n", "n"
            )
        num_scores = sum(
            len(prompt.token_ids) * (1 + prompt.params.prompt_logprobs) * prompt.params.n
            for prompt in prompts
            if prompt.params.prompt_logprobs is not None
        )
        if num_scores > MAX_PROMPT_SCORES:
            raise bad_request(
                f"{num_scores} log probabilities of prompt tokens in one answer; {MAX_PROMPT_SCORES} are the most: ask "
                "for fewer alternatives or send the prompts in several requests",
                "prompt_logprobs" if prompts[0].params.logprobs is None else "logprobs",
            )

    def require_known(self, token_ids: Sequence[int], param: str) -> None:
        """Raise APIError 400 unless the model's vocabulary has all these tokens."""
        size = self.engine.model.vocab_size
        if size is not None and max(token_ids, default=0) >= size:
            raise bad_request(f"token id {max(token_ids)}: the model's vocabulary has ids from 0 to {size - 1}", param)

    async def tokens_of(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[list[int]]:
        """Each prompt's token ids. APIError 400 for texts that are too long."""
        num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._tokenize(num_characters, lambda: self._encode_all(prompts, add_special_tokens))

    async def tokens_of_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """A conversation's token ids. APIError 400 for one that is too long."""
        codec, contents = self.engine.model.codec, [message["content"] for message in messages]

        def encode() -> list[int]:
            codec.require_short(contents, self.engine.model.engine.longest_request, "messages")
            return codec.encode_chat(messages, add_generation_prompt, add_special_tokens)

        size = sum(map(len, contents)) + _CHARACTERS_A_MESSAGE * len(messages)
        return await self._tokenize(size, encode)

    async def text_of(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones too."""
        return await self._tokenize(len(token_ids), lambda: self.engine.model.codec.decode(token_ids))

    async def names_of(self, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return await self._tokenize(len(token_ids), lambda: self.engine.model.codec.names(token_ids))

    def _encode_all(self, prompts: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
        codec, longest = self.engine.model.codec, self.engine.model.engine.longest_request
        token_ids: list[list[int]] = []
        num_tokens, most = 0, self.bodies.limits.num_values
        for prompt in prompts:
            if isinstance(prompt, str):
                codec.require_short([prompt], longest, "prompt")
                prompt = codec.encode(prompt, add_special_tokens)
            num_tokens += len(prompt)
            if num_tokens > most:
                raise bad_request(f"the prompts have more than {most} tokens; send them in several requests", "prompt")
            token_ids.append(prompt)
        return token_ids

    async def _tokenize(self, num_characters: int, encode: Callable[[], T]) -> T:
        return await self.offload.run(num_characters * _TOKENIZE_S_A_CHARACTER, encode)

    async def respond(
        self, answer_class: type[Answer], body: GenerationRequest, prompts: list[Prompt], http: Request
    ) -> Response:
        """Whole, or as events."""
        self.require_bounded(prompts)
        self.bodies.release(http)
        answer = answer_class(body, self.engine, prompts, http.state.request_id)
        self.load += 1
        setattr(http.state, COUNTED, True)
        if body.stream:
            return EventStream(answer)
        try:
            response = await answer_unless_gone(answer, answer.whole(), http.receive)
        except StreamEnded as error:
            raise self.unavailable(str(error)) from error
        return response or Response(status_code=499)  # The client has gone.
