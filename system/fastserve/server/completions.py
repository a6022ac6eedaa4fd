"""Answers to a generation request: whole, or as server-sent events, one for each token."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.request import SamplingParams
from fastserve.server.engine_thread import EngineThread
from fastserve.server.errors import error_body, json_response
from fastserve.server.protocol import GenerationRequest
from fastserve.server.request_id import RequestId
from fastserve.server.streams import FinishReason, StreamEnded, TokenStream
from fastserve.server.text import Detokenizer

T = TypeVar("T")


class Prompt(NamedTuple):
    """What one choice is generated from."""

    token_ids: Sequence[int]
    params: SamplingParams
    detokenizer: Detokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """One prompt's output on its way to the client."""

    index: int
    stream: TokenStream
    detokenizer: Detokenizer
    stop_token_ids: frozenset[int]
    """Those its client has given, without the model's own ends of sequence."""


class Piece(NamedTuple):
    """What a token adds to a choice."""

    choice: int
    text: str
    token_id: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    """What the client gave as a stop and ended the choice: a text or a token's id."""


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
        self.choices = [
            Choice(
                i,
                engine.add(f"{unique}-{i}", prompt.token_ids, prompt.params),
                prompt.detokenizer,
                engine.model.stop_token_ids(prompt.params),
            )
            for i, prompt in enumerate(prompts)
        ]

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

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of an event that goes out together with the choice's first token, before it."""
        return None

    # -- the two forms -------------------------------------------------------------------------------------------

    async def whole(self) -> Response:
        """The answer when all of it is there. Raises StreamEnded if it cannot be given."""
        texts: list[list[str]] = [[] for _ in self.choices]
        token_ids: list[list[int]] = [[] for _ in self.choices]
        last: list[Piece | None] = [None] * len(self.choices)
        async with aclosing(self._pieces()) as pieces:
            async for batch in pieces:
                for piece in batch:
                    texts[piece.choice].append(piece.text)
                    token_ids[piece.choice].append(piece.token_id)
                    last[piece.choice] = piece
        choices = []
        for choice in self.choices:
            i, end = choice.index, last[choice.index]
            assert end is not None
            written = {
                "index": i,
                **self.choice("".join(texts[i])),
                "finish_reason": end.finish_reason,
                "stop_reason": end.stop_reason,
                "logprobs": None,
            }
            choices.append(written | ({"token_ids": token_ids[i]} if self._body.return_token_ids else {}))
        usage = self._usage(sum(map(len, token_ids)))
        return json_response({**self._head(self.object_name), "choices": choices, "usage": usage})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, those that are there at a time in one go: one a token, then the usage if asked for, then
        [DONE]. If the request fails, the last one is an error. No event precedes the first token: clients time it."""
        include_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        head = json.dumps(
            {**self._head(self.chunk_name), "usage": None} if include_usage else self._head(self.chunk_name)
        )
        before, after = f'data: {head[:-1]}, "choices": [', "]}\n\n"
        num_tokens = 0
        unopened = {choice.index for choice in self.choices}
        try:
            async with aclosing(self._pieces()) as pieces:
                async for batch in pieces:
                    num_tokens += len(batch)
                    written = [f"{before}{self._written(piece)}{after}" for piece in batch]
                    index = batch[0].choice  # All pieces of a batch are of one choice.
                    if index in unopened:
                        unopened.remove(index)
                        if (opening := self.opening(index)) is not None:
                            written.insert(0, f"{before}{json.dumps(opening)}{after}")
                    yield "".join(written).encode()
        except StreamEnded as error:
            yield f"data: {json.dumps(error_body(503, str(error)))}\n\n".encode()
            return
        usage = ""
        if include_usage:
            usage = json.dumps({**self._head(self.chunk_name), "choices": [], "usage": self._usage(num_tokens)})
            usage = f"data: {usage}\n\n"
        yield f"{usage}data: [DONE]\n\n".encode()

    def _written(self, piece: Piece) -> str:
        # JSON by hand: there is one for every token.
        token = f', "token_ids": [{piece.token_id}]' if self._body.return_token_ids else ""
        reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
        stop = "null" if piece.stop_reason is None else json.dumps(piece.stop_reason)
        content = self.chunk_content(json.dumps(piece.text))
        return (
            f'{{"index": {piece.choice}, {content}{token}, "logprobs": null, "finish_reason": {reason}, '
            f'"stop_reason": {stop}}}'
        )

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
        detokenizer = choice.detokenizer
        async for tokens in choice.stream.batches():
            pieces: list[Piece] = []
            for token_id, reason in tokens:
                text = "" if reason == "stop" else detokenizer.add(token_id)
                if reason is not None:
                    text += detokenizer.end()
                if detokenizer.stopped:
                    self._engine.abort(choice.stream)
                    yield [*pieces, Piece(choice.index, text, token_id, "stop", detokenizer.stop_text)]
                    return
                stop_reason = token_id if reason == "stop" and token_id in choice.stop_token_ids else None
                pieces.append(Piece(choice.index, text, token_id, reason, stop_reason))
            yield pieces

    def _head(self, object_name: str) -> dict[str, Any]:
        model = self._engine.model
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def _usage(self, num_output_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
        }


class TextAnswer(Answer):
    """To /v1/completions."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:  # noqa: D102 (as above)
        return {"text": text}

    def chunk_content(self, text: str) -> str:  # noqa: D102
        return f'"text": {text}'


class ChatAnswer(Answer):
    """To /v1/chat/completions."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:  # noqa: D102
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk_content(self, text: str) -> str:  # noqa: D102
        return f'"delta": {{"content": {text}}}'

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
