"""Large answers are written in pieces, with the same text as in one call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.profiles import share

pytest.importorskip("fastapi")

from fastserve.server.answers.json_text import json_in_pieces

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES, lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values, max_size=4)
)


@share(0.5)
@given(VALUES, st.integers(0, 5))
def test_pieces_are_the_text_of_json_dumps(value: Any, levels: int) -> None:
    assert json_in_pieces(value, levels) == json.dumps(value)


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_long_lists_are_written_in_pieces(count: int) -> None:
    for value in (list(range(count)), [{"a": [i]} for i in range(count)], [None, *({} for _ in range(count))]):
        assert json_in_pieces({"a": value}) == json.dumps({"a": value})
