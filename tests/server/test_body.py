"""Bodies are parsed as JSON, within bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.profiles import share

pytest.importorskip("uvicorn")


from fastserve.server.http.body import BodyLimits, parse
from fastserve.server.http.errors import APIError
from support.servers import RunningServer

LIMITS = BodyLimits.of_context(2048)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**98), 10**99) | st.floats(allow_nan=False) | TEXTS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(TEXTS, values, max_size=4),
    max_leaves=20,
)


def refusal(body: bytes, limits: BodyLimits = LIMITS) -> str:
    """Return why a body is refused."""
    with pytest.raises(APIError) as caught:
        parse(body, limits)
    assert caught.value.status_code == 400
    return caught.value.detail


@share(0.5)
@given(VALUES, st.booleans())
def test_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode(), LIMITS) == value


@share(0.5)
@given(st.binary() | st.text('[]{}",:\\0e.-tfn \ud7ff', max_size=30).map(str.encode))
def test_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        expected = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_without_repetition)
    except ValueError:
        assert refusal(body)
    else:
        assert parse(body, LIMITS) == expected


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


@pytest.mark.parametrize(
    ("piece", "most", "what"),
    [
        (b"[]", 16_383, "lists and objects"),
        (b"{}", 16_383, "lists and objects"),
        (b'""', 65_536, "texts"),
        (rb'"a\\"', 131_073, "texts"),
        (b"7", 2**18 + 2**13 + 1, "values"),
        (b"0.5", 4096, "fractions"),
        (b"1e5", 4096, "fractions"),
    ],
)
def test_the_parts_of_a_body_are_bounded(piece: bytes, most: int, what: str) -> None:
    assert len(parse(b"[" + b",".join([piece] * most) + b"]", LIMITS)) == most
    assert f"{what}; send less in one request" in refusal(b"[" + b",".join([piece] * (most + 1)) + b"]")


@pytest.mark.parametrize(
    "text", ["[" * 10**5, ",{" * 10**6, '", [' * 10**5, '\\"[' * 10**5, "\\" * 10**5 + "[" * 10**5]
)
def test_characters_inside_a_text_do_not_count(text: str) -> None:
    assert parse(json.dumps({"prompt": text}).encode(), LIMITS) == {"prompt": text}


def test_the_limits_follow_the_context() -> None:
    assert BodyLimits.of_context(2048) == BodyLimits(2 * 2**20, 2**18)
    assert BodyLimits.of_context(2**17) == BodyLimits(4 * 2**20, 2**18)
    assert BodyLimits.of_context(10**6) == BodyLimits(8 * 2**20, 10**6)
    # A prompt as long as the context fits, as ids or as a text with every character escaped.
    for context in (2048, 2**15, 2**17, 2**18):
        limits = BodyLimits.of_context(context)
        ids = json.dumps({"prompt": [200_000] * context}).encode()
        text = json.dumps({"prompt": "東京" * context}).encode()
        for body in (ids, text):
            assert len(body) <= limits.num_bytes
            parse(body, limits)


def test_every_route_that_reads_a_body_reads_it_within_bounds(quick: RunningServer) -> None:
    paths = quick.get("/openapi.json").json["paths"]
    reading = [path for path, methods in paths.items() if "requestBody" in methods.get("post", {})]
    assert {"/v1/completions", "/v1/chat/completions"} <= {*reading}
    for path in reading:
        assert quick.post(b" " * (3 * 2**20), path).status == 413
