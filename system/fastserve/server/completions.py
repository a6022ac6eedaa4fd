"""Answers to a generation request: whole, or as server-sent events, one for each token."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.core.logprobs import TokenLogprobs
from fastserve.core.request import SamplingParams
from fastserve.server.engine_thread import EngineThread
from fastserve.server.errors import error_body
from fastserve.server.json_text import json_in_pieces
from fastserve.server.logprobs import ScoredToken, of_chat, of_completion, of_prompt
from fastserve.server.protocol import CompletionRequest, GenerationRequest
from fastserve.server.request_id import RequestId
from fastserve.server.streams import FinishReason, StreamEnded, Token, TokenStream
from fastserve.server.text import Detokenizer

T = TypeVar("T")


_WRITTEN_AT_ONCE = 256
"""Scored tokens up to which writing them is quicker than handing it to another thread."""
_IDS_A_SCORE = 16
"""Token ids that are written in the time of one scored token."""
_INT64 = 2**63 - 1


class Prompt(NamedTuple):
    """What one or several choices are generated from."""

    token_ids: Sequence[int]
    params: SamplingParams
    detokenizers: Sequence[Detokenizer]
    """One for each of `params.n` choices."""
    text: str | None
    """As it came; None if as token ids, or not all of it is used."""


@dataclass(slots=True)
class Choice:
    """One output on its way to the client."""

    index: int
    stream: TokenStream
    detokenizer: Detokenizer
    stop_token_ids: frozenset[int]
    """Those its client has given, without the model's own ends of sequence."""
    prompt: Prompt
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on, once its first token has come."""
    num_echoed: int = 0
    """Characters of the prompt that its text begins with."""
    has_begun: bool = False


class Piece(NamedTuple):
    """What a token adds to a choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """What the client gave as a stop and ended the choice: a text or a token's id."""
    num_generated: int = 1
    """Of the tokens; others are the prompt's, or none is."""
    scored: tuple[ScoredToken, ...] = ()
    """Of requests that ask for log probabilities."""


class Answer(ABC):
    """All choices of one request. The two kinds of request differ in how a choice is written."""

    prefix: str
    """Of the answer's id."""
    object_name: str
    chunk_name: str

    def __init__(
        self, body: GenerationRequest, engine: EngineThread, prompts: Sequence[Prompt], request: RequestId
    ) -> None:
        """The prompts enter the engine here; whoever makes an answer must `close` it."""
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
        """End what is unfinished, of which nobody will hear any more."""
        for choice in self.choices:
            self._engine.abort(choice.stream)

    # -- how a choice is written ---------------------------------------------------------------------------------

    @abstractmethod
    def choice(self, text: str) -> dict[str, Any]:
        """A whole choice's own part."""

    @abstractmethod
    def chunk_content(self, text: str) -> str:
        """A piece's own part, as JSON; its text is JSON already."""

    @abstractmethod
    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        """The log probabilities of some tokens."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of an event that goes out together with the choice's first token, before it."""
        return None

    # -- the two forms -------------------------------------------------------------------------------------------

    async def whole(self) -> Response:
        """The answer when all of it is there. Raises StreamEnded if it cannot be given."""
        pieces_of: list[list[Piece]] = [[] for _ in self.choices]
        async with aclosing(self._pieces()) as batches:
            async for batch in batches:
                pieces_of[batch[0].choice] += batch  # All pieces of a batch are of one choice.
        choices = []
        for choice, pieces in zip(self.choices, pieces_of, strict=True):
            text = "".join(piece.text for piece in pieces)
            written = {"index": choice.index, **self.choice(text), "finish_reason": pieces[-1].finish_reason}
            written["stop_reason"] = pieces[-1].stop_reason
            written["logprobs"] = await self._logprobs([one for piece in pieces for one in piece.scored])
            if self._body.return_token_ids:
                written["token_ids"] = [token for piece in pieces for token in piece.token_ids]
            choices.append(written)
            await asyncio.sleep(0)  # Other streams' turn.
        num_generated = sum(piece.num_generated for pieces in pieces_of for piece in pieces)
        usage = self._usage(num_generated)
        answer = {**self._head(self.object_name), "choices": choices, "usage": usage}
        if (num_top := self._body.prompt_logprobs) is not None:
            codec = self._engine.model.codec
            for choice in self.choices:
                scored = choice.prompt_logprobs
                told = await _in_thread_if_many(len(scored), partial(of_prompt, codec, scored, num_top))
                self.tell_prompt_logprobs(answer, choice.index, told)
        num_scored = sum(len(choice.prompt_logprobs) for choice in self.choices)
        num_scored += sum(len(piece.scored) for pieces in pieces_of for piece in pieces)
        cost = num_scored + len(choices) + num_generated // _IDS_A_SCORE
        text = await _in_thread_if_many(cost, partial(json_in_pieces, answer))
        return Response(text, media_type="application/json")

    def tell_prompt_logprobs(self, answer: dict[str, Any], index: int, told: list[Any]) -> None:
        """Put the log probabilities of a choice's prompt where vLLM has them."""
        answer["choices"][index]["prompt_logprobs"] = told

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, those that are there at a time in one go: one a token, then the usage if asked for, then
        [DONE]. If the request fails, the last one is an error. No event precedes the first token: clients time it."""
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
            told = ""
            if continuous:
                usage = self._usage(generated[index], len(self.choices[index].prompt.token_ids))
                told = f', "usage": {json.dumps(usage)}'
            return f'data: {head[:-1]}{told}, "choices": [{choice}]}}\n\n'

        try:
            async with aclosing(self._pieces()) as pieces:
                async for batch in pieces:
                    written = []
                    index = batch[0].choice  # All pieces of a batch are of one choice.
                    if not generated[index] and (opening := self.opening(index)) is not None:
                        written.append(event(index, json.dumps(opening)))
                    for piece in batch:
                        generated[index] += piece.num_generated
                        logprobs = await self._logprobs_text(piece.scored) if piece.scored else "null"
                        written.append(event(index, self._written(piece, logprobs)))
                    yield "".join(written).encode()
        except StreamEnded as error:
            yield f"data: {json.dumps(error_body(503, str(error)))}\n\n".encode()
            return
        last = ""
        if include_usage:
            usage = self._usage(sum(generated))
            last = f"data: {json.dumps({**self._head(self.chunk_name), 'choices': [], 'usage': usage})}\n\n"
        yield f"{last}data: [DONE]\n\n".encode()

    def _written(self, piece: Piece, logprobs: str) -> str:
        # JSON by hand: there is one for every token.
        tokens = f', "token_ids": {list(piece.token_ids)}' if self._body.return_token_ids else ""
        reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
        stop = "null" if piece.stop_reason is None else json.dumps(piece.stop_reason)
        content = self.chunk_content(json.dumps(piece.text))
        return (
            f'{{"index": {piece.choice}, {content}{tokens}, "logprobs": {logprobs}, "finish_reason": {reason}, '
            f'"stop_reason": {stop}}}'
        )

    async def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """As the choice or the event has them; None if they are not asked for."""
        return await _in_thread_if_many(len(scored), lambda: self.logprobs(scored)) if scored else None

    async def _logprobs_text(self, scored: Sequence[ScoredToken]) -> str:
        """As JSON."""
        logprobs = await self._logprobs(scored)
        return await _in_thread_if_many(len(scored), lambda: json_in_pieces(logprobs))

    async def _pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What comes of all choices, as it comes."""
        if len(self.choices) == 1:
            async for pieces in self._decoded(self.choices[0]):
                yield pieces
            return
        queue: asyncio.Queue[list[Piece] | None] = asyncio.Queue()

        async def feed(choice: Choice) -> None:
            try:
                async for pieces in self._decoded(choice):
                    queue.put_nowait(pieces)
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(feed(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                batch = await queue.get()
                if batch is None:
                    left -= 1
                else:
                    yield batch
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _decoded(self, choice: Choice) -> AsyncIterator[list[Piece]]:
        """The pieces of one choice, up to its last token or the text that stops it."""
        async for tokens in choice.stream.batches():
            pieces: list[Piece] = []
            for token in tokens:
                if not choice.has_begun:
                    choice.has_begun = True
                    choice.prompt_logprobs = token.prompt_logprobs
                    pieces.append(await self.first_piece(choice, token))
                else:
                    pieces.append(self.piece(choice, token))
                if choice.detokenizer.stopped:
                    self._engine.abort(choice.stream)
                    yield pieces
                    return
            yield pieces

    def piece(self, choice: Choice, token: Token) -> Piece:
        """What the token adds to its choice."""
        detokenizer, reason = choice.detokenizer, token.finish_reason
        offset = choice.num_echoed + detokenizer.num_characters
        # A token that ends the output has no text in it.
        hidden = reason == "stop" and not self._body.include_stop_str_in_output
        text = "" if hidden else detokenizer.add(token.token_id)
        if reason is not None:
            text += detokenizer.end()
        stop_reason: str | int | None = None
        if detokenizer.stopped:
            reason, stop_reason = "stop", detokenizer.stop_text
        elif reason == "stop" and token.token_id in choice.stop_token_ids:
            stop_reason = token.token_id
        scored = () if token.logprobs is None else (ScoredToken(token.token_id, offset, token.logprobs),)
        return Piece(choice.index, text, (token.token_id,), reason, stop_reason, 1, scored)

    async def first_piece(self, choice: Choice, token: Token) -> Piece:
        """What the first token adds."""
        return self.piece(choice, token)

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
        """Of all choices, or of one; a prompt counts once, however many choices it has."""
        num_prompt_tokens = self._num_prompt_tokens if num_prompt_tokens is None else num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
        }


class TextAnswer(Answer):
    """To /v1/completions."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:  # noqa: D102 (as above)
        return {"text": text}

    def chunk_content(self, text: str) -> str:  # noqa: D102
        return f'"text": {text}'

    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:  # noqa: D102
        return of_completion(self._engine.model.codec, scored, self._body.num_logprobs or 0)

    async def first_piece(self, choice: Choice, token: Token) -> Piece:  # noqa: D102
        body = self._body
        assert isinstance(body, CompletionRequest)
        if not body.echo:
            return self.piece(choice, token)
        prompt = choice.prompt
        text, scored = await _in_thread_if_many(len(prompt.token_ids), lambda: self._echoed(choice))
        choice.num_echoed = len(text)
        if not body.max_tokens:  # The engine generates one nevertheless.
            return Piece(choice.index, text, tuple(prompt.token_ids), "length", None, 0, scored)
        first = self.piece(choice, token)
        return first._replace(
            text=text + first.text, token_ids=(*prompt.token_ids, *first.token_ids), scored=(*scored, *first.scored)
        )

    def _echoed(self, choice: Choice) -> tuple[str, tuple[ScoredToken, ...]]:
        """The prompt's text, and its tokens if they are scored."""
        prompt = choice.prompt
        texts = self._engine.model.codec.token_texts(prompt.token_ids)
        text = "".join(texts) if prompt.text is None else prompt.text
        if self._body.num_logprobs is None:
            return text, ()
        offsets = accumulate(map(len, texts), initial=0)
        return text, tuple(map(ScoredToken, prompt.token_ids, offsets, (None, *choice.prompt_logprobs)))


class ChatAnswer(Answer):
    """To /v1/chat/completions."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:  # noqa: D102
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk_content(self, text: str) -> str:  # noqa: D102
        return f'"delta": {{"content": {text}}}'

    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:  # noqa: D102
        return of_chat(self._engine.model.codec, scored, self._body.num_logprobs or 0)

    def tell_prompt_logprobs(self, answer: dict[str, Any], index: int, told: list[Any]) -> None:  # noqa: D102
        answer["prompt_logprobs"] = told

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: D102
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


class EventStream(Response):
    """Sends an answer's events as they come; a client that goes away ends the answer."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        await answer_unless_gone(self._answer, self._send(send), receive)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._answer.events()) as events:
            async for chunk in events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _in_thread_if_many(count: int, write: Callable[[], T]) -> T:
    """What `write` returns, which takes a time that grows with `count`: other streams are not to wait for it."""
    return write() if count <= _WRITTEN_AT_ONCE else await asyncio.to_thread(write)


async def answer_unless_gone(answer: Answer, answering: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """What `answering` returns, or None if the client goes before that. Closes the answer in any case."""
    working = asyncio.create_task(answering)
    gone = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        answer.close()
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
