"""Decoding generated tokens one by one, up to the texts that stop an output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Protocol

from fastserve.core.countable_tokens import StandIns

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Tokenizers write it for bytes that are no character."""
_PROMPT_TOKENS_SEEN = 8
"""Tokens at the prompt's end that decoding begins with: a token's text depends on the tokens before it."""
_MAX_TOKENS_DECODED = 64
"""Tokens after which a character counts as complete: a model can generate bytes that are no character for ever."""
_MAX_BYTES_A_CHARACTER = 4


class TokenTexts(Protocol):
    """Gives the text that each token adds to the tokens before it."""

    def text_of(self, token: int) -> str:
        """Return the text that `token` adds; empty while a character is incomplete."""

    def end(self) -> str:
        """Return what is left of a character that was never completed."""


class NumberTexts:
    """Without a tokenizer the text of a token is its number."""

    def text_of(self, token: int) -> str:  # noqa: D102 (of the protocol)
        return f" {token}"

    def end(self) -> str:  # noqa: D102 (of the protocol)
        return ""


class DecodedTexts:
    """Decodes each token together with the tokens since the last but one position with no incomplete character.

    Text once returned stays. Where a tokenizer changes the text of earlier bytes, the changed part is added again.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stand_ins: StandIns | None) -> None:
        """`tokenizer`: one of the tokenizers library. `stand_ins` replace ids that it does not know."""
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._known = (lambda token: token) if stand_ins is None else stand_ins.shown
        self._ids = list(map(self._known, prompt[-_PROMPT_TOKENS_SEEN:]))
        self._num_complete = len(self._ids)
        """How many of the ids precede the last position with no incomplete character."""
        self._shown: str = self._decode(self._ids)
        """Text of the ids that was returned before, or is the prompt's."""

    def text_of(self, token: int) -> str:  # noqa: D102 (of the protocol)
        self._ids.append(self._known(token))
        text = self._decode(self._ids)
        num_replaced = len(text) - len(text.rstrip(REPLACEMENT))
        if num_replaced and len(self._ids) < _MAX_TOKENS_DECODED:
            # The first bytes of a character: some tokenizers write one replacement for all, some one for each.
            text = text[: len(text) - min(num_replaced, _MAX_BYTES_A_CHARACTER - 1)]
            if not text.startswith(self._shown):
                return ""
            added, self._shown = text[len(self._shown) :], text
            return added
        added = self._beyond_shown(text)
        if added or len(self._ids) >= _MAX_TOKENS_DECODED:
            self._ids = self._ids[self._num_complete :]
            self._num_complete, self._shown = len(self._ids), self._decode(self._ids)
        return added

    def end(self) -> str:  # noqa: D102 (of the protocol)
        return self._beyond_shown(self._decode(self._ids))

    def _beyond_shown(self, text: str) -> str:
        same = takewhile(lambda characters: characters[0] == characters[1], zip(text, self._shown, strict=False))
        return text[sum(1 for _ in same) :]


class Detokenizer:
    """Turns generated tokens into text, one by one."""

    stop_text: str | None = None
    """The stop text that was generated; None: none was. After it nothing more comes."""

    def __init__(self, tokens: TokenTexts) -> None:
        self._tokens = tokens
        self.num_characters = 0
        """Characters of all tokens until now, shown or held back."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was generated."""
        return self.stop_text is not None

    def add(self, token: int) -> str:
        """Take a token and return the text that can now be shown; may be empty."""
        text = self._tokens.text_of(token)
        self.num_characters += len(text)
        return text

    def end(self) -> str:
        """Return the text held back until now, at the end of the output."""
        return self._tokens.end()


class StoppingDetokenizer(Detokenizer):
    """Ends at the first of several stop texts. Holds back text that may be the beginning of one."""

    def __init__(self, tokens: TokenTexts, stop: Sequence[str], include: bool = False, min_tokens: int = 0) -> None:
        """`include`: show the stop text, too. `min_tokens`: tokens in which no stop text is looked for."""
        super().__init__(tokens)
        self._stop = stop
        self._include = include
        self._num_unsearched = min_tokens
        self._held_back = ""

    def add(self, token: int) -> str:  # noqa: D102 (inherited)
        if self.stopped:
            return ""
        text = super().add(token)
        if self._num_unsearched:
            self._num_unsearched -= 1
            return text
        return self._up_to_stop(text)

    def end(self) -> str:  # noqa: D102 (inherited)
        text = "" if self.stopped else self._up_to_stop(super().end())
        held_back, self._held_back = self._held_back, ""
        return text + held_back

    def _up_to_stop(self, added: str) -> str:
        text = self._held_back + added
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop_text = min(found)
            self._held_back = ""
            return text[: at + len(self.stop_text)] if self._include else text[:at]
        num_shown = len(text) - self._longest_beginning(text)
        self._held_back = text[num_shown:]
        return text[:num_shown]

    def _longest_beginning(self, text: str) -> int:
        """Return how many characters at the end of `text` may be the beginning of a stop text."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
