"""Tokens whose text is one token again: what a simulation generates, so that clients can count it.

A client that tokenizes an output of such tokens finds as many as were generated. All tokens of the list differ, so the
client sees if one is lost or comes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST = 1000


def countable_tokens(tokenizer: Any) -> list[int]:
    """Up to 1,000 tokens that, generated in turn and over and over, can be counted in their text.

    Where the tokenizer has them, the texts " 0" to " 999", in this order. Else words, each with its space; else letters
    and digits that do not merge. No special tokens and no parts of a character are among them. Empty if the tokenizer
    has none. `tokenizer` is one of the tokenizers library.
    """
    numbers = [tokenizer.encode(f" {number}", add_special_tokens=False).ids for number in range(MOST)]
    if all(len(ids) == 1 for ids in numbers):
        chosen = [ids[0] for ids in numbers]
        if tokenizer.decode(chosen).split() == [str(number) for number in range(MOST)] and _comes_back(
            tokenizer, chosen
        ):
            return chosen
    for is_wanted in (_is_word, _is_letter):
        chosen = list(_in_turn(tokenizer, is_wanted))
        # From the last to the first, too.
        if chosen and _comes_back(tokenizer, chosen + chosen[:1]):
            return chosen
    return []


class StandIns:
    """Tokens to show in place of ids that a tokenizer does not know: a model's vocabulary may be larger.

    A model with dummy weights generates such ids, and each is to have a text that a client can count.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None) -> None:
        """`tokenizer` is one of the tokenizers library, `vocab_size` the model's; None: any id may come."""
        self._tokenizer = tokenizer
        self._tokens: Sequence[int] = ()
        if vocab_size is None or vocab_size > tokenizer.get_vocab_size():
            self._tokens = countable_tokens(tokenizer)

    def shown(self, token: int) -> int:
        """The token itself if the tokenizer knows it or has no stand-ins."""
        if not self._tokens or self._tokenizer.id_to_token(token) is not None:
            return token
        return self._tokens[token % len(self._tokens)]


def _in_turn(tokenizer: Any, is_wanted: Callable[[Any, int], bool]) -> Iterator[int]:
    """The first tokens wanted, by id, each of which can follow the one before it."""
    added = tokenizer.get_added_tokens_decoder()
    texts: set[str] = set()
    last: list[int] = []
    for token in range(tokenizer.get_vocab_size()):
        if token in added or not is_wanted(tokenizer, token):
            continue
        text = tokenizer.decode([token]).strip()
        if text in texts or not _comes_back(tokenizer, [*last, token]):
            continue
        texts.add(text)
        last = [token]
        yield token
        if len(texts) == MOST:
            return


def _is_word(tokenizer: Any, token: int) -> bool:
    """Whether two of it in a row are two equal words, with a space between."""
    twice = tokenizer.decode([token, token]).split()
    return len(twice) == 2 and twice[0] == twice[1] and twice[0].isalnum() and _comes_back(tokenizer, [token, token])


def _is_letter(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return len(text) == 1 and text.isalnum()


def _comes_back(tokenizer: Any, tokens: list[int]) -> bool:
    """Whether these are the tokens of their text. Some tokenizers leave out the space before the first."""
    text = tokenizer.decode(tokens)
    return any(tokenizer.encode(each, add_special_tokens=False).ids == tokens for each in (text, f" {text}"))
