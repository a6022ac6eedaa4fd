"""Countable tokens: what a simulation generates, so that a client can check the output.

The text of such tokens tokenizes to the same tokens, so a client counts as many as were generated. All differ, so the
client also notices a lost or repeated token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST = 1000


def countable_tokens(tokenizer: Any) -> list[int]:
    """Up to 1,000 tokens that can be counted in their text when generated cyclically.

    They are the texts " 0" to " 999", in this order, if the tokenizer has them. Otherwise they are words, each with its
    space, or else letters and digits that do not merge. Special tokens and parts of characters are left out. Empty if
    the tokenizer has no such tokens. `tokenizer` is one of the tokenizers library.
    """
    numbers = [tokenizer.encode(f" {number}", add_special_tokens=False).ids for number in range(MOST)]
    if all(len(ids) == 1 for ids in numbers):
        chosen = [ids[0] for ids in numbers]
        if tokenizer.decode(chosen).split() == [str(number) for number in range(MOST)] and _round_trips(
            tokenizer, chosen
        ):
            return chosen
    for is_wanted in (_is_word, _is_letter):
        chosen = list(_chain(tokenizer, is_wanted))
        # The cycle, too: the first must follow the last.
        if chosen and _round_trips(tokenizer, chosen + chosen[:1]):
            return chosen
    return []


class StandIns:
    """Tokens to show for ids beyond the tokenizer's vocabulary, since the model's may be larger.

    A model with dummy weights generates such ids; each gets the text of a countable token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None) -> None:
        """`tokenizer` is one of the tokenizers library, `vocab_size` the model's; None: any id is possible."""
        self._tokenizer = tokenizer
        self._tokens: Sequence[int] = ()
        if vocab_size is None or vocab_size > tokenizer.get_vocab_size():
            self._tokens = countable_tokens(tokenizer)

    def shown(self, token: int) -> int:
        """The token to show: itself if the tokenizer knows it, or if there are no stand-ins."""
        if not self._tokens or self._tokenizer.id_to_token(token) is not None:
            return token
        return self._tokens[token % len(self._tokens)]


def _chain(tokenizer: Any, is_wanted: Callable[[Any, int], bool]) -> Iterator[int]:
    """Wanted tokens in order of their ids, each countable after the one before it."""
    added = tokenizer.get_added_tokens_decoder()
    texts: set[str] = set()
    last: list[int] = []
    for token in range(tokenizer.get_vocab_size()):
        if token in added or not is_wanted(tokenizer, token):
            continue
        text = tokenizer.decode([token]).strip()
        if text in texts or not _round_trips(tokenizer, [*last, token]):
            continue
        texts.add(text)
        last = [token]
        yield token
        if len(texts) == MOST:
            return


def _is_word(tokenizer: Any, token: int) -> bool:
    """Whether two such tokens in a row are the same word twice, with a space between."""
    twice = tokenizer.decode([token, token]).split()
    return len(twice) == 2 and twice[0] == twice[1] and twice[0].isalnum() and _round_trips(tokenizer, [token, token])


def _is_letter(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return len(text) == 1 and text.isalnum()


def _round_trips(tokenizer: Any, tokens: list[int]) -> bool:
    """Whether the text of the tokens tokenizes to them. Some tokenizers drop the space before the first."""
    text = tokenizer.decode(tokens)
    return any(tokenizer.encode(each, add_special_tokens=False).ids == tokens for each in (text, f" {text}"))
