"""Answers to /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fastserve.server.answers.answer import Answer
from fastserve.server.answers.choices import Choice, Piece
from fastserve.server.answers.logprobs import ScoredToken, of_completion
from fastserve.server.engine.streams import Token
from fastserve.server.http.offload import in_thread_if_many
from fastserve.server.protocol.completion import CompletionRequest


class CompletionAnswer(Answer):
    """The answer to /v1/completions."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice_content(self, text: str) -> dict[str, Any]:  # noqa: D102 (inherited)
        return {"text": text}

    def chunk_content(self, text: str) -> str:  # noqa: D102 (inherited)
        return f'"text": {text}'

    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:  # noqa: D102 (inherited)
        return of_completion(self._engine.model.codec, scored, self._body.num_logprobs or 0)

    async def first_piece(self, choice: Choice, token: Token) -> Piece:  # noqa: D102 (inherited)
        body = self._body
        assert isinstance(body, CompletionRequest)
        if not body.echo:
            return self._piece(choice, token)
        prompt = choice.prompt
        text, scored = await in_thread_if_many(len(prompt.token_ids), lambda: self._echo(choice))
        choice.num_echoed = len(text)
        if not body.max_tokens:  # The engine generates one token nevertheless; it is not told.
            return Piece(choice.index, text, tuple(prompt.token_ids), "length", None, 0, scored)
        first = self._piece(choice, token)
        return first._replace(
            text=text + first.text, token_ids=(*prompt.token_ids, *first.token_ids), scored=(*scored, *first.scored)
        )

    def _echo(self, choice: Choice) -> tuple[str, tuple[ScoredToken, ...]]:
        """Return the prompt's text, and its tokens if log probabilities are asked for."""
        prompt = choice.prompt
        texts = self._engine.model.codec.token_texts(prompt.token_ids)
        text = "".join(texts) if prompt.text is None else prompt.text
        if self._body.num_logprobs is None:
            return text, ()
        offsets = accumulate(map(len, texts), initial=0)
        return text, tuple(map(ScoredToken, prompt.token_ids, offsets, (None, *choice.prompt_logprobs)))
