"""The served model's tokenizer: prompts to tokens, and the texts of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastserve.core.countable_tokens import StandIns
from fastserve.server.http.errors import bad_request
from fastserve.server.text.detokenizer import (
    REPLACEMENT,
    DecodedTexts,
    Detokenizer,
    NumberTexts,
    StoppingDetokenizer,
    TokenTexts,
)

_ALWAYS_TOKENIZED = 2**18
"""Characters that are tokenized without being counted first; they take less than 100 MB."""
_MAX_CHARACTERS_A_TOKEN = 8
"""In the mean of a long text; English has 4."""
_PIECE = 2**16
"""Characters of a long text that are tokenized at a time to count its tokens."""
_SURELY_LONGER = 1.25
"""Tokens of the pieces over the context, beyond which the whole text is surely too long."""
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece tokenizers write a byte."""


def _bytes_of_characters() -> dict[str, int]:
    """Return how byte-level tokenizers write bytes: visible ones of Latin-1 as they are, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class TextCodec:
    """The served model's tokenizer, or none.

    Without a tokenizer, prompts are token ids and the text of a token is its number, so clients have text to count.
    Text prompts, chats and stop texts are refused.
    """

    def __init__(self, tokenizer: Any = None, stand_ins: StandIns | None = None) -> None:
        """`tokenizer`: one of transformers backed by the tokenizers library, or the built-in one; None: no tokenizer.
        `stand_ins` replace ids that the tokenizer does not know; None: such ids have no text."""
        self._tokenizer = tokenizer
        self._stand_ins = stand_ins
        self._longest_token = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()))

    @property
    def has_tokenizer(self) -> bool:
        """Whether tokens have real text."""
        return self._tokenizer is not None

    def require_short(self, texts: Sequence[str], context: int, param: str) -> None:
        """Raise APIError 400 if the texts are sure to be more than `context` tokens in all.

        A tokenizer takes about 300 bytes of memory for each token. To bound that, tokens of a long text are counted in
        pieces first; each cut may add a token.
        """
        num_characters = sum(map(len, texts))
        if self._tokenizer is None or num_characters <= _ALWAYS_TOKENIZED:
            return
        beginning = f"This model's maximum context length is {context} tokens: a prompt of {num_characters} characters"
        most = min(context * self._longest_token, max(_ALWAYS_TOKENIZED, context * _MAX_CHARACTERS_A_TOKEN))
        if num_characters > most:
            raise bad_request(f"{beginning} is longer; send at most {most}", param, "context_length_exceeded")
        num_tokens = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                num_tokens += len(self._tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False))
                if num_tokens > _SURELY_LONGER * context:
                    raise bad_request(f"{beginning} is longer", param, "context_length_exceeded")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt. Raises APIError 400 without a tokenizer."""
        self._require("a text prompt", "prompt", "give token ids")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_chat(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the tokens of a conversation, written by the tokenizer's chat template.

        Raises APIError 400 without a tokenizer or a template, and for messages that the template does not take.
        """
        self._require("a chat", "messages", "use /v1/completions with token ids")
        if not self._tokenizer.chat_template:
            raise bad_request("the model's tokenizer has no chat template; use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program that can raise anything.
            raise bad_request(f"the model's chat template does not take these messages: {error}", "messages") from error
        # The template has written its special tokens already.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included. Raises APIError 400 without a tokenizer."""
        self._require("a text", "tokens", "token ids are all it has")
        known = token_ids if self._stand_ins is None else list(map(self._stand_ins.shown, token_ids))
        text: str = self._tokenizer.backend_tokenizer.decode(known, skip_special_tokens=False)
        return text

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token as the vocabulary writes it. Raises APIError 400 without a tokenizer."""
        self._require("a token's text", "return_token_strs", "leave it out")
        return [self._tokenizer.backend_tokenizer.id_to_token(token) for token in token_ids]

    def decoder(
        self, prompt: Sequence[int], stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0
    ) -> Detokenizer:
        """Return a decoder of the tokens after `prompt`, which ends at the first of the texts `stop`.

        With `include_stop` that text is shown. The first `min_tokens` tokens are not searched for it.
        """
        if not stop:
            return Detokenizer(self._token_texts(prompt))
        self._require("stop", "stop", "use stop_token_ids")
        return StoppingDetokenizer(self._token_texts(prompt), stop, include_stop, min_tokens)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to the tokens before it."""
        texts = self._token_texts(())
        added = [texts.text_of(token) for token in token_ids]
        return [*added[:-1], added[-1] + texts.end()] if added else []

    def token_text(self, token_id: int) -> str:
        """Return a token's own text, of special tokens too, as distinct as possible.

        A part of a character is written `bytes:` and its bytes, as OpenAI does; an unknown token by its id.
        """
        text = self._token_text(token_id)
        if REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's own text in UTF-8, or the bytes of a character that it stands for."""
        text = self._token_text(token_id)
        if REPLACEMENT in text:
            piece = self._tokenizer.backend_tokenizer.id_to_token(token_id) or ""
            if found := _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(found[1])
            if piece and all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece)
        return text.encode()

    def _token_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return NumberTexts().text_of(token_id)
        tokenizer = self._tokenizer.backend_tokenizer
        if tokenizer.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        text: str = tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _token_texts(self, prompt: Sequence[int]) -> TokenTexts:
        if self._tokenizer is None:
            return NumberTexts()
        return DecodedTexts(self._tokenizer.backend_tokenizer, prompt, self._stand_ins)

    def _require(self, what: str, param: str, instead: str) -> None:
        if self._tokenizer is None:
            raise bad_request(
                f"{what} needs a tokenizer and this server has none; {instead}, or start it with --tokenizer builtin "
                "or a directory",
                param,
            )
