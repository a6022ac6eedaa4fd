"""Between text and tokens: prompts in, generated tokens out as they come, and the texts that stop them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from fastserve.core.countable_tokens import StandIns
from fastserve.server.errors import bad_request

_PROMPT_TOKENS_SEEN = 8
"""Of the prompt's end, what a decoder is shown: a token's text depends on those before it."""
_MOST_TOKENS_DECODED = 64
"""How long one waits for text: a model can go on with bytes that are no character for ever."""
_MOST_BYTES_OF_A_CHARACTER = 4
_ALWAYS_TOKENIZED = 2**18
"""Characters, which take less than 100 MB."""
_MOST_CHARACTERS_A_TOKEN = 8
"""In the mean of a long text; in English 4."""
_PIECE = 2**16
_SURELY_LONGER = 1.25
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""How tokenizers of pieces write a byte."""


def _bytes_of_characters() -> dict[str, int]:
    """How tokenizers of bytes write each: as it is if that can be seen in Latin-1, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class TextCodec:
    """The served model's tokenizer, or none.

    Without one, prompts are token ids, and the text of a token is its number: what a client prints and counts is there,
    and what needs real text (text prompts, chats, stop texts) is refused.
    """

    def __init__(self, tokenizer: Any = None, stand_ins: StandIns | None = None) -> None:
        """`tokenizer`: the built-in one or one of transformers, backed by the tokenizers library. `stand_ins`: what is
        shown in place of ids that it does not know; None: nothing."""
        self._tokenizer = tokenizer
        self._stand_ins = stand_ins
        self._longest_token = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()))

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be told from tokens."""
        return self._tokenizer is not None

    def require_short(self, texts: Sequence[str], context: int, param: str) -> None:
        """Raise APIError 400 if the texts are sure to be more than `context` tokens in all.

        A tokenizer takes some 300 bytes of memory for each token, and it is not to take them for nothing. So the
        longest texts are counted in pieces first; at a cut there may be a token more than in the whole.
        """
        num_characters = sum(map(len, texts))
        if self._tokenizer is None or num_characters <= _ALWAYS_TOKENIZED:
            return
        beginning = f"This model's maximum context length is {context} tokens: a prompt of {num_characters} characters"
        most = min(context * self._longest_token, max(_ALWAYS_TOKENIZED, context * _MOST_CHARACTERS_A_TOKEN))
        if num_characters > most:
            raise bad_request(f"{beginning} is longer; send at most {most}", param, "context_length_exceeded")
        num_tokens = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                num_tokens += len(self._tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False))
                if num_tokens > _SURELY_LONGER * context:
                    raise bad_request(f"{beginning} is longer", param, "context_length_exceeded")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a prompt. APIError 400 without a tokenizer."""
        self._require("a text prompt", "prompt", "give token ids")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_chat(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Tokens of a conversation in the tokenizer's chat template, up to where the assistant is to speak."""
        self._require("a chat", "messages", "use /v1/completions with token ids")
        if not self._tokenizer.chat_template:
            raise bad_request("the model's tokenizer has no chat template; use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program, and says by whatever exception what it does not take.
            raise bad_request(f"the model's chat template does not take these messages: {error}", "messages") from error
        # The template has written the special tokens there are.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones too. APIError 400 without a tokenizer."""
        self._require("a text", "tokens", "token ids are all it has")
        known = token_ids if self._stand_ins is None else list(map(self._stand_ins.shown, token_ids))
        text: str = self._tokenizer.backend_tokenizer.decode(known, skip_special_tokens=False)
        return text

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it. APIError 400 without a tokenizer."""
        self._require("a token's text", "return_token_strs", "leave it out")
        return [self._tokenizer.backend_tokenizer.id_to_token(token) for token in token_ids]

    def decoder(
        self, prompt: Sequence[int], stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0
    ) -> Detokenizer:
        """A decoder of what follows `prompt`, that ends at the first of the texts `stop`.

        With `include_stop` that text is shown. The first `min_tokens` tokens are not searched for it.
        """
        if not stop:
            return Detokenizer(self._token_texts(prompt))
        self._require("stop", "stop", "use stop_token_ids")
        return StoppingDetokenizer(self._token_texts(prompt), stop, include_stop, min_tokens)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each of these adds to those before it."""
        texts = self._token_texts(())
        added = [texts.text_of(token) for token in token_ids]
        return [*added[:-1], added[-1] + texts.end()] if added else []

    def token_text(self, token_id: int) -> str:
        """A token's own text, special tokens' too. No two tokens have the same, as far as that can be: a part of a
        character is `bytes:` and its bytes, as OpenAI has it, a token that the tokenizer does not know its id."""
        text = self._token_text(token_id)
        if _REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own text in UTF-8, or the part of a character that it is."""
        text = self._token_text(token_id)
        if _REPLACEMENT in text:
            piece = self._tokenizer.backend_tokenizer.id_to_token(token_id) or ""
            if found := _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(found[1])
            if piece and all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece)
        return text.encode()

    def _token_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return _Numbers().text_of(token_id)
        tokenizer = self._tokenizer.backend_tokenizer
        if tokenizer.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        text: str = tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _token_texts(self, prompt: Sequence[int]) -> _TokenTexts:
        if self._tokenizer is None:
            return _Numbers()
        return _Texts(self._tokenizer.backend_tokenizer, prompt[-_PROMPT_TOKENS_SEEN:], self._stand_ins)

    def _require(self, what: str, param: str, instead: str) -> None:
        if self._tokenizer is None:
            raise bad_request(
                f"{what} needs a tokenizer and this server has none; {instead}, or start it with --tokenizer builtin "
                "or a directory",
                param,
            )


class _TokenTexts:
    """The text that each token adds."""

    def text_of(self, token: int) -> str:
        """Empty while a character is incomplete."""
        raise NotImplementedError

    def end(self) -> str:
        """What is left of a character that was never completed."""
        return ""


class _Numbers(_TokenTexts):
    def text_of(self, token: int) -> str:
        return f" {token}"


class _Texts(_TokenTexts):
    """Decodes each token with those before it, from the last place but one at which no character was incomplete.

    What is shown stays shown. Where bytes that are no text make a tokenizer change its mind about those before them,
    what has changed is added.
    """

    def __init__(self, tokenizer: Any, prompt_end: Sequence[int], stand_ins: StandIns | None) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._known = (lambda token: token) if stand_ins is None else stand_ins.shown
        self._ids = list(map(self._known, prompt_end))
        self._num_complete = len(self._ids)
        """Of those, how many come before the last place at which no character was incomplete."""
        self._shown: str = self._decode(self._ids)
        """Of their text; the prompt's is not to come again."""

    def text_of(self, token: int) -> str:
        self._ids.append(self._known(token))
        text = self._decode(self._ids)
        num_replaced = len(text) - len(text.rstrip(_REPLACEMENT))
        if num_replaced and len(self._ids) < _MOST_TOKENS_DECODED:
            # A character's first bytes, of which some tokenizers write one replacement and some one for each.
            text = text[: len(text) - min(num_replaced, _MOST_BYTES_OF_A_CHARACTER - 1)]
            if not text.startswith(self._shown):
                return ""
            added, self._shown = text[len(self._shown) :], text
            return added
        added = self._beyond_shown(text)
        if added or len(self._ids) >= _MOST_TOKENS_DECODED:
            self._ids = self._ids[self._num_complete :]
            self._num_complete, self._shown = len(self._ids), self._decode(self._ids)
        return added

    def end(self) -> str:
        return self._beyond_shown(self._decode(self._ids))

    def _beyond_shown(self, text: str) -> str:
        alike = takewhile(lambda characters: characters[0] == characters[1], zip(text, self._shown, strict=False))
        return text[sum(1 for _ in alike) :]


class Detokenizer:
    """Turns generated tokens into text, one by one."""

    stop_text: str | None = None
    """The text to stop at that was generated, if one was: nothing more is to come."""

    def __init__(self, tokens: _TokenTexts) -> None:
        self._tokens = tokens
        self.num_characters = 0
        """Of the text of all tokens until now, shown or kept back."""

    @property
    def stopped(self) -> bool:
        """Whether a text to stop at was generated."""
        return self.stop_text is not None

    def add(self, token: int) -> str:
        """The text that can be shown now that this token is there; may be empty."""
        text = self._tokens.text_of(token)
        self.num_characters += len(text)
        return text

    def end(self) -> str:
        """The text kept back until now, at the end of the output."""
        return self._tokens.end()


class StoppingDetokenizer(Detokenizer):
    """One that ends before the first of some texts, or behind it, and keeps back what may be its beginning."""

    def __init__(self, tokens: _TokenTexts, stop: Sequence[str], include: bool = False, min_tokens: int = 0) -> None:
        super().__init__(tokens)
        self._stop = stop
        self._include = include
        self._num_unsearched = min_tokens
        self._kept = ""

    def add(self, token: int) -> str:  # noqa: D102 (as above)
        if self.stopped:
            return ""
        text = super().add(token)
        if self._num_unsearched:
            self._num_unsearched -= 1
            return text
        return self._up_to_stop(text)

    def end(self) -> str:  # noqa: D102
        text = "" if self.stopped else self._up_to_stop(super().end())
        kept, self._kept = self._kept, ""
        return text + kept

    def _up_to_stop(self, added: str) -> str:
        text = self._kept + added
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop_text = min(found)
            self._kept = ""
            return text[: at + len(self.stop_text)] if self._include else text[:at]
        shown = len(text) - self._longest_beginning(text)
        self._kept = text[shown:]
        return text[:shown]

    def _longest_beginning(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
