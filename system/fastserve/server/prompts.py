"""From what clients send to prompts for the engine: tokenizing, truncating, bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastserve.engine import NO_LOGPROBS
from fastserve.server.answers.choices import Prompt
from fastserve.server.http.body import BodyLimits
from fastserve.server.http.errors import bad_request
from fastserve.server.http.offload import Offload
from fastserve.server.model import ServedModel
from fastserve.server.protocol.generation import GenerationRequest

T = TypeVar("T")

MAX_PROMPT_SCORES = 2**17
"""Log probabilities of prompt tokens in one answer: those of the tokens themselves and of likelier ones."""
_TOKENIZE_S_A_CHARACTER = 1.3e-6
_CHARACTERS_A_MESSAGE = 30
"""Cost of writing a message by the chat template, in characters tokenized."""


class Prompts:
    """Turns texts, conversations and token ids into prompts that the model can serve. Refuses all others."""

    def __init__(self, model: ServedModel, limits: BodyLimits, offload: Offload) -> None:
        self._model = model
        self._limits = limits
        self._offload = offload

    # -- tokens --------------------------------------------------------------------------------------------------

    async def tokens_of(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[list[int]]:
        """Return each prompt's token ids. Raises APIError 400 for texts that are too long."""
        num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._run(num_characters, lambda: self._encode_all(prompts, add_special_tokens))

    async def tokens_of_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """Return a conversation's token ids. Raises APIError 400 for a conversation that is too long."""
        codec, contents = self._model.codec, [message["content"] for message in messages]

        def encode() -> list[int]:
            codec.require_short(contents, self._model.engine.longest_request, "messages")
            return codec.encode_chat(messages, add_generation_prompt, add_special_tokens)

        size = sum(map(len, contents)) + _CHARACTERS_A_MESSAGE * len(messages)
        return await self._run(size, encode)

    async def text_of(self, token_ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        return await self._run(len(token_ids), lambda: self._model.codec.decode(token_ids))

    async def names_of(self, token_ids: list[int]) -> list[str]:
        """Return each token as the vocabulary writes it."""
        return await self._run(len(token_ids), lambda: self._model.codec.names(token_ids))

    def _encode_all(self, prompts: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
        codec, longest = self._model.codec, self._model.engine.longest_request
        token_ids: list[list[int]] = []
        num_tokens, max_tokens = 0, self._limits.num_values
        for prompt in prompts:
            if isinstance(prompt, str):
                codec.require_short([prompt], longest, "prompt")
                prompt = codec.encode(prompt, add_special_tokens)
            num_tokens += len(prompt)
            if num_tokens > max_tokens:
                raise bad_request(
                    f"the prompts have more than {max_tokens} tokens; send them in several requests", "prompt"
                )
            token_ids.append(prompt)
        return token_ids

    async def _run(self, num_characters: int, function: Callable[[], T]) -> T:
        return await self._offload.run(num_characters * _TOKENIZE_S_A_CHARACTER, function)

    # -- prompts -------------------------------------------------------------------------------------------------

    def prompt(
        self, body: GenerationRequest, token_ids: list[int], limit: str | None, param: str, text: str | None = None
    ) -> Prompt:
        """Return the engine's input. Raises APIError 400 for a prompt that cannot be served.

        `limit` names the field that bounds the output; None: the output may be as long as there is room for. `param`
        names the field that the prompt came from. `text` is the prompt, if it came as text.
        """
        model = self._model
        longest = model.engine.longest_request
        if (num_kept := body.truncate_prompt_tokens) is not None:
            if num_kept < 0:
                num_kept = max(1, longest - (1 if limit is None else max(1, getattr(body, limit))))
            if len(token_ids) > num_kept:
                token_ids, text = token_ids[-num_kept:], None
        if not token_ids:
            raise bad_request("an empty prompt: it needs at least one token", param)
        self.require_known(token_ids, param)
        if limit is None:
            room = max(1, longest - len(token_ids))
            max_tokens = min(room, model.generation_config.max_new_tokens or room)
        else:  # An echo without new tokens computes the prompt and generates a token nevertheless.
            max_tokens = max(1, getattr(body, limit))
        if why := model.engine.rejection_reason("refused", len(token_ids), max_tokens):
            # Clients recognise the error by its first words.
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
        """Raise APIError 400 if one request asks for too many prompt tokens or log probabilities of prompt tokens."""
        num_tokens = sum(len(prompt.token_ids) * prompt.params.n for prompt in prompts)
        max_tokens = self._limits.num_values
        if num_tokens > max_tokens:
            raise bad_request(
                f"{num_tokens} prompt tokens, counted for each of the n outputs, are more than {max_tokens}; lower n",
                "n",
            )
        num_scores = sum(
            len(prompt.token_ids) * (1 + prompt.params.prompt_logprobs) * prompt.params.n
            for prompt in prompts
            if prompt.params.prompt_logprobs is not None
        )
        if num_scores > MAX_PROMPT_SCORES:
            raise bad_request(
                f"{num_scores} log probabilities of prompt tokens in one answer are more than {MAX_PROMPT_SCORES}; ask "
                "for fewer alternatives or send the prompts in several requests",
                "prompt_logprobs" if prompts[0].params.logprobs is None else "logprobs",
            )

    def require_known(self, token_ids: Sequence[int], param: str) -> None:
        """Raise APIError 400 unless all tokens are in the model's vocabulary."""
        size = self._model.vocab_size
        if size is not None and max(token_ids, default=0) >= size:
            raise bad_request(f"token id {max(token_ids)}: the model's vocabulary has ids from 0 to {size - 1}", param)
