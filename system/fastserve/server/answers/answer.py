"""The answer to a request that generates: whole, or as server-sent events, one for each token."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.responses import Response

from fastserve.server.answers.choices import Choice, Piece, Prompt, merged
from fastserve.server.answers.json_text import json_in_pieces
from fastserve.server.answers.logprobs import ScoredToken, of_prompt
from fastserve.server.engine.streams import StreamEnded, Token
from fastserve.server.engine.thread import EngineThread
from fastserve.server.http.errors import error_body
from fastserve.server.http.offload import in_thread_if_many
from fastserve.server.http.request_id import RequestId
from fastserve.server.protocol.generation import GenerationRequest

_IDS_A_SCORE = 16
"""Token ids that are written in the time of one scored token."""
_INT64 = 2**63 - 1


class Answer(ABC):
    """All choices of one request. Completions and chats differ in how a choice is written."""

    prefix: str
    """Of the answer's id."""
    object_name: str
    """`object` of a whole answer."""
    chunk_name: str
    """`object` of an event."""

    def __init__(
        self, body: GenerationRequest, engine: EngineThread, prompts: Sequence[Prompt], request: RequestId
    ) -> None:
        """Give the prompts to the engine. The caller must `close` the answer."""
        self._body = body
        self._engine = engine
        self._id, unique = f"{self.prefix}-{request.said}", f"{self.prefix}-{request.unique}"
        self._created = int(time.time())
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.choices: list[Choice] = []
        for prompt in prompts:
            params, stop_token_ids = prompt.params, engine.model.stop_token_ids(prompt.params)
            for number, detokenizer in enumerate(prompt.detokenizers):
                index = len(self.choices)
                one = params if params.n == 1 else replace(params, n=1, seed=(params.seed + number) & _INT64)
                stream = engine.add(f"{unique}-{index}", prompt.token_ids, one)
                self.choices.append(Choice(index, stream, detokenizer, stop_token_ids, prompt))

    def close(self) -> None:
        """Abort unfinished choices."""
        for choice in self.choices:
            self._engine.abort(choice.stream)

    # -- how a choice is written ---------------------------------------------------------------------------------

    @abstractmethod
    def choice_content(self, text: str) -> dict[str, Any]:
        """Return the fields of a whole choice that hold its text."""

    @abstractmethod
    def chunk_content(self, text: str) -> str:
        """Return the field of an event's choice that holds its text, as JSON. `text` is JSON already."""

    @abstractmethod
    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        """Return the `logprobs` of a choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return a choice for an event that is sent before the choice's first token, together with it."""
        return None

    def add_prompt_logprobs(self, answer: dict[str, Any], index: int, logprobs: list[Any]) -> None:
        """Put the log probabilities of a choice's prompt into `answer`, where vLLM has them."""
        answer["choices"][index]["prompt_logprobs"] = logprobs

    async def first_piece(self, choice: Choice, token: Token) -> Piece:
        """Return what the first token adds."""
        return self._piece(choice, token)

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> Response:
        """Wait for all tokens and return the answer. Raises StreamEnded if a choice fails."""
        pieces_of: list[list[Piece]] = [[] for _ in self.choices]
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                pieces_of[batch[0].choice] += batch
        choices = []
        for choice, pieces in zip(self.choices, pieces_of, strict=True):
            text = "".join(piece.text for piece in pieces)
            written = {"index": choice.index, **self.choice_content(text), "finish_reason": pieces[-1].finish_reason}
            written["stop_reason"] = pieces[-1].stop_reason
            written["logprobs"] = await self._logprobs([one for piece in pieces for one in piece.scored])
            if self._body.return_token_ids:
                written["token_ids"] = [token for piece in pieces for token in piece.token_ids]
            choices.append(written)
            await asyncio.sleep(0)  # Give the other streams a turn.
        num_generated = sum(piece.num_generated for pieces in pieces_of for piece in pieces)
        usage = self._usage(num_generated)
        answer = {**self._head(self.object_name), "choices": choices, "usage": usage}
        if (num_top := self._body.prompt_logprobs) is not None:
            codec = self._engine.model.codec
            for choice in self.choices:
                scored = choice.prompt_logprobs
                logprobs = await in_thread_if_many(len(scored), partial(of_prompt, codec, scored, num_top))
                self.add_prompt_logprobs(answer, choice.index, logprobs)
        num_scored = sum(len(choice.prompt_logprobs) for choice in self.choices)
        num_scored += sum(len(piece.scored) for pieces in pieces_of for piece in pieces)
        cost = num_scored + len(choices) + num_generated // _IDS_A_SCORE
        content = await in_thread_if_many(cost, partial(json_in_pieces, answer))
        return Response(content, media_type="application/json")

    # -- as events -----------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: one a token, then the usage if asked for, then [DONE].

        Events that are ready at the same time are yielded as one chunk. If the request fails, the last event is an
        error. No event precedes the first token, since clients time it.
        """
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        head = json.dumps(
            {**self._head(self.chunk_name), "usage": None}
            if include_usage and not continuous
            else self._head(self.chunk_name)
        )
        generated = [0] * len(self.choices)

        def event(index: int, choice: str) -> str:
            usage = ""
            if continuous:
                so_far = self._usage(generated[index], len(self.choices[index].prompt.token_ids))
                usage = f', "usage": {json.dumps(so_far)}'
            return f'data: {head[:-1]}{usage}, "choices": [{choice}]}}\n\n'

        try:
            async with aclosing(self._batches()) as batches:
                async for batch in batches:
                    written = []
                    index = batch[0].choice
                    if not generated[index] and (opening := self.opening(index)) is not None:
                        written.append(event(index, json.dumps(opening)))
                    for piece in batch:
                        generated[index] += piece.num_generated
                        logprobs = await self._logprobs_json(piece.scored) if piece.scored else "null"
                        written.append(event(index, self._chunk_json(piece, logprobs)))
                    yield "".join(written).encode()
        except StreamEnded as error:
            yield f"data: {json.dumps(error_body(503, str(error)))}\n\n".encode()
            return
        last = ""
        if include_usage:
            usage = self._usage(sum(generated))
            last = f"data: {json.dumps({**self._head(self.chunk_name), 'choices': [], 'usage': usage})}\n\n"
        yield f"{last}data: [DONE]\n\n".encode()

    def _chunk_json(self, piece: Piece, logprobs: str) -> str:
        # Written by hand, since there is one for every token.
        tokens = f', "token_ids": {list(piece.token_ids)}' if self._body.return_token_ids else ""
        reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
        stop = "null" if piece.stop_reason is None else json.dumps(piece.stop_reason)
        content = self.chunk_content(json.dumps(piece.text))
        return (
            f'{{"index": {piece.choice}, {content}{tokens}, "logprobs": {logprobs}, "finish_reason": {reason}, '
            f'"stop_reason": {stop}}}'
        )

    # -- both forms ----------------------------------------------------------------------------------------------

    def _batches(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces of all choices as they come; those of one batch are of one choice."""
        return merged([self._decoded(choice) for choice in self.choices])

    async def _decoded(self, choice: Choice) -> AsyncIterator[list[Piece]]:
        """Yield the pieces of one choice, up to its last token or its stop text."""
        async for tokens in choice.stream.batches():
            pieces: list[Piece] = []
            for token in tokens:
                if not choice.has_begun:
                    choice.has_begun = True
                    choice.prompt_logprobs = token.prompt_logprobs
                    pieces.append(await self.first_piece(choice, token))
                else:
                    pieces.append(self._piece(choice, token))
                if choice.detokenizer.stopped:
                    self._engine.abort(choice.stream)
                    yield pieces
                    return
            yield pieces

    def _piece(self, choice: Choice, token: Token) -> Piece:
        return choice.piece(token, self._body.include_stop_str_in_output)

    async def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """Return the `logprobs` of a choice; None if the request does not ask for them."""
        return await in_thread_if_many(len(scored), lambda: self.logprobs(scored)) if scored else None

    async def _logprobs_json(self, scored: Sequence[ScoredToken]) -> str:
        logprobs = await self._logprobs(scored)
        return await in_thread_if_many(len(scored), lambda: json_in_pieces(logprobs))

    def _head(self, object_name: str) -> dict[str, Any]:
        model = self._engine.model
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def _usage(self, num_output_tokens: int, num_prompt_tokens: int | None = None) -> dict[str, int]:
        """Return the usage, by default of all choices; a prompt counts once, however many choices it has."""
        num_prompt_tokens = self._num_prompt_tokens if num_prompt_tokens is None else num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
        }
