"""The tokens that a simulation generates: their text, tokenized again, is as many tokens, of any kind of tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from tokenizers import decoders, models, normalizers, pre_tokenizers  # noqa: E402

from fastserve.core.countable_tokens import countable_tokens  # noqa: E402
from fastserve.server.text.codec import TextCodec  # noqa: E402
from support.tokenizers import KINDS, of_bytes, of_pieces, of_words  # noqa: E402


def of_spaced_pieces() -> Any:
    """Words begin with ▁, as a normalizer writes the space before each: as Llama 2's, with its digits."""
    words = ["▁", "▁the", "▁of", "▁cat", "▁cats", "▁1", "1", "2", "s", "t", "h", "e", "o", "f", "c", "a"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    merges = [("t", "h"), ("▁", "the"), ("▁", "cat"), ("▁cat", "s"), ("▁", "of"), ("c", "a"), ("ca", "t"), ("o", "f")]
    merges += [("th", "e"), ("▁", "1")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def of_some_numbers() -> Any:
    """Has " 0" to " 99" and no larger ones, and words."""
    words = [*(f"w{i}" for i in range(50)), *(str(i) for i in range(100))]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


MADE: dict[str, Callable[[], Any]] = {
    **{kind: lambda make=make: make().backend_tokenizer for kind, make in KINDS.items()},  # type: ignore[misc]
    "many bytes": lambda: of_bytes(600).backend_tokenizer,
    "spaced pieces": of_spaced_pieces,
    "some numbers": of_some_numbers,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("count", [1, 2, 50, 2500])
def test_their_text_is_as_many_tokens(kind: str, count: int) -> None:
    tokenizer = MADE[kind]()
    cycle = countable_tokens(tokenizer)
    tokens = [cycle[place % len(cycle)] for place in range(count)]
    text = tokenizer.decode(tokens)
    encoded = [tokenizer.encode(each, add_special_tokens=False).ids for each in (text, f" {text}")]
    assert tokens in encoded


@pytest.mark.parametrize("kind", MADE)
def test_each_is_another_and_shows_a_text_of_its_own(kind: str) -> None:
    tokenizer = MADE[kind]()
    cycle = countable_tokens(tokenizer)
    texts = [tokenizer.decode([token]).strip() for token in cycle]
    assert len(set(cycle)) == len(set(texts)) == len(cycle) > 1
    assert all(text and "\N{REPLACEMENT CHARACTER}" not in text for text in texts)
    assert not set(cycle) & set(tokenizer.get_added_tokens_decoder())
    assert max(cycle) < tokenizer.get_vocab_size()


@pytest.mark.parametrize("kind", KINDS)
def test_every_one_is_shown_as_it_comes(kind: str) -> None:
    tokenizer = KINDS[kind]()
    cycle = countable_tokens(tokenizer.backend_tokenizer)
    decoder = TextCodec(tokenizer).decoder([*cycle[-2:]], ())
    assert all(decoder.add(token) for token in cycle * 2)
    assert decoder.end() == ""


def test_words_go_first() -> None:
    words = of_words()
    assert [words.decode([token]) for token in countable_tokens(words.backend_tokenizer)[:3]] == ["w0", "w1", "w2"]
    pieces = of_spaced_pieces()
    found = {pieces.decode([token]) for token in countable_tokens(pieces)}
    assert {"the", "of", "cats"} <= found
    assert not found & {"t", "h", ""}
    # Without words, letters that do not merge.
    assert all(len(of_pieces().decode([token])) == 1 for token in countable_tokens(of_pieces().backend_tokenizer))


def test_a_tokenizer_may_have_none() -> None:
    nothing = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a b": 1}, unk_token="<unk>"))
    nothing.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    nothing.add_special_tokens(["<unk>"])
    assert countable_tokens(nothing) == []
