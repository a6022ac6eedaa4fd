"""Tokens to text, one by one: nothing lost or repeated, no half characters, and nothing after a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.profiles import share

pytest.importorskip("fastapi")
pytest.importorskip("transformers")

from fastserve.server.http.errors import APIError
from fastserve.server.text.codec import TextCodec
from fastserve.server.text.detokenizer import Detokenizer, StoppingDetokenizer
from support.tokenizers import KINDS, of_bytes, of_pieces

TOKENS = st.lists(st.integers(0, 340), max_size=12)
BYTES = st.lists(st.integers(3, 3 + 255), min_size=1, max_size=20)
"""Tokens of `of_bytes` and `of_pieces` that are one byte each: mostly no text."""
HARD = "café 東京 👍🏽 é\N{COMBINING ACUTE ACCENT} \N{ZERO WIDTH JOINER}\0 \N{REPLACEMENT CHARACTER}!"

tokenizer_of = cache(lambda kind: KINDS[kind]())


def pieces(decoder: Detokenizer, tokens: Sequence[int]) -> list[str]:
    """Return what each token shows, and the rest at the end."""
    return [*map(decoder.add, tokens), decoder.end()]


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


@share(0.2)
@given(st.text())
@example(HARD)
def test_a_text_is_decoded_whole(text: str) -> None:
    tokenizer = tokenizer_of("bytes")
    tokens = tokenizer.encode(text)
    shown = pieces(TextCodec(tokenizer).decoder([5], ()), tokens)
    assert "".join(shown) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown), "half a character was shown"


def test_a_character_is_shown_when_it_is_complete() -> None:
    tokenizer = tokenizer_of("pieces")
    tokens = [3 + byte for byte in "é👍b".encode()]
    assert pieces(TextCodec(tokenizer).decoder([5], ()), tokens) == ["", "é", "", "", "", "👍", "b", ""]


@share(0.5)
@given(st.data())
def test_the_pieces_of_any_tokens_are_their_text(data: st.DataObject) -> None:
    tokenizer = tokenizer_of("bytes")
    prompt = data.draw(TOKENS | BYTES)
    tokens = data.draw(TOKENS | BYTES)
    shown = "".join(pieces(TextCodec(tokenizer).decoder(prompt, ()), tokens))
    alone = decoded(tokenizer, tokens)
    if decoded(tokenizer, prompt).endswith("\N{REPLACEMENT CHARACTER}"):
        # The first bytes may complete a character of the prompt.
        shown, alone = shown.lstrip("\N{REPLACEMENT CHARACTER}"), alone.lstrip("\N{REPLACEMENT CHARACTER}")
        assert alone.endswith(shown) or shown.endswith(alone)
    else:
        assert shown == alone


@share(0.3)
@given(BYTES | TOKENS, BYTES | TOKENS)
def test_bytes_that_are_no_text_are_no_error(prompt: list[int], tokens: list[int]) -> None:
    tokenizer = tokenizer_of("pieces")
    limit = len(tokenizer)
    prompt, tokens = ([token % limit for token in ids] for ids in (prompt, tokens))
    pieces(TextCodec(tokenizer).decoder(prompt, ()), tokens)


def test_the_first_words_space_is_kept_after_a_prompt() -> None:
    tokenizer = tokenizer_of("pieces")
    he, llo, wor, ld = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁he", "llo", "▁wor", "ld"))
    assert pieces(TextCodec(tokenizer).decoder([he, llo], ()), [wor, ld, he]) == [" wor", "ld", " he", ""]


def test_special_tokens_have_no_text() -> None:
    tokenizer = tokenizer_of("words")
    end, w0, w1 = (tokenizer.convert_tokens_to_ids(word) for word in ("</s>", "w0", "w1"))
    assert pieces(TextCodec(tokenizer).decoder([w0, end], ()), [w0, end, w1]) == [" w0", "", " w1", ""]


@pytest.mark.parametrize("token", [3 + 0x80, 3 + 0xE6, 2])
def test_bytes_that_are_never_text_do_not_accumulate(token: int) -> None:
    decoder = TextCodec(of_pieces()).decoder([5], ())
    lengths = []
    decode = decoder._tokens._decode  # type: ignore[attr-defined]

    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        text: str = decode(ids)
        return text

    decoder._tokens._decode = counted  # type: ignore[attr-defined]
    pieces(decoder, [token] * 1000)
    assert max(lengths) <= 128


# -- texts that stop -------------------------------------------------------------------------------------------------


class Given(Detokenizer):
    """Tokens whose texts are given."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def text_of(self, token: int) -> str:
        return self.texts[token]

    def end(self) -> str:
        return ""


def expected(texts: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text up to the first stop text, found in the whole text, and whether there is one."""
    for count in range(len(texts) + 1):
        text = "".join(texts[:count])
        if beginnings := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(beginnings)], True
    return text, False


@given(
    texts=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
)
@example(texts=["xab", "cy"], stops=["bc"])
@example(texts=["aab"], stops=["ab", "aab"])
@example(texts=["", "ab"], stops=["ab"])
@example(texts=["ab", "aba", "c"], stops=["abac"])
def test_stop_texts_cut_as_in_the_whole_text(texts: list[str], stops: list[str]) -> None:
    decoder = StoppingDetokenizer(Given(texts), stops)  # type: ignore[arg-type]
    shown = ""
    for number in range(len(texts)):
        shown += decoder.add(number)
        if decoder.stopped:
            break
        # Exactly the possible beginning of a stop text is held back.
        so_far = "".join(texts[: number + 1])
        assert so_far.startswith(shown)
        kept = so_far[len(shown) :]
        assert not kept or any(stop.startswith(kept) for stop in stops)
    shown += decoder.end()
    assert (shown, decoder.stopped) == expected(texts, stops)
    if decoder.stopped:
        assert decoder.add(0) == decoder.end() == ""


def test_a_stop_may_be_the_rest_of_a_character() -> None:
    tokenizer = tokenizer_of("bytes")
    decoder = TextCodec(tokenizer).decoder([5], ("\N{REPLACEMENT CHARACTER}",))
    a, first_byte_of_é = tokenizer.convert_tokens_to_ids(["a", "Ã"])
    assert [decoder.add(a), decoder.add(first_byte_of_é)] == ["a", ""]
    assert not decoder.stopped
    assert decoder.end() == ""
    assert decoder.stopped


# -- what needs a tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda codec: codec.encode("a"), "prompt"),
        (lambda codec: codec.encode_chat([{"role": "user", "content": "a"}]), "messages"),
        (lambda codec: codec.decoder([1], ("a",)), "stop"),
    ],
)
def test_without_a_tokenizer_text_is_refused(call: Any, param: str) -> None:
    with pytest.raises(APIError, match="needs a tokenizer and this server has none") as caught:
        call(TextCodec())
    assert (caught.value.status_code, caught.value.param) == (400, param)


def test_without_a_tokenizer_the_text_of_a_token_is_its_number() -> None:
    assert pieces(TextCodec().decoder([1], ()), [7, 0]) == [" 7", " 0", ""]


def test_a_chat_is_written_in_the_models_template() -> None:
    tokenizer = tokenizer_of("bytes")
    codec = TextCodec(tokenizer)
    messages = [{"role": "system", "content": "Käfer"}, {"role": "user", "content": "</s>"}]
    assert codec.encode_chat(messages) == tokenizer.encode("system Käfer\nuser </s>\nassistant")
    with pytest.raises(APIError, match="does not take these messages: unknown role nobody") as caught:
        codec.encode_chat([{"role": "nobody", "content": ""}])
    assert caught.value.param == "messages"


def test_without_a_template_chats_are_refused() -> None:
    tokenizer = of_bytes()
    tokenizer.chat_template = None
    with pytest.raises(APIError, match="no chat template; use /v1/completions"):
        TextCodec(tokenizer).encode_chat([{"role": "user", "content": "a"}])
