"""Answers to /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.server.answers.answer import Answer
from fastserve.server.answers.logprobs import ScoredToken, of_chat


class ChatAnswer(Answer):
    """The answer to /v1/chat/completions."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice_content(self, text: str) -> dict[str, Any]:  # noqa: D102 (inherited)
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk_content(self, text: str) -> str:  # noqa: D102 (inherited)
        return f'"delta": {{"content": {text}}}'

    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:  # noqa: D102 (inherited)
        return of_chat(self._engine.model.codec, scored, self._body.num_logprobs or 0)

    def add_prompt_logprobs(self, answer: dict[str, Any], index: int, logprobs: list[Any]) -> None:  # noqa: D102
        answer["prompt_logprobs"] = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: D102 (inherited)
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
