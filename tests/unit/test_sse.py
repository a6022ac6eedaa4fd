"""Server-sent events, however the stream is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.client.sse import Event, EventParser

EVENTS = [
    Event(b"", b'{"text": "a"}'),
    Event(b"token", b"two\nlines"),
    Event(b"", "wörd".encode()),
    Event(b"", b"[DONE]"),
    Event(b"", b"unfinished"),
]
STREAM = (
    b"\xef\xbb\xbf: a comment after a byte order mark\r\n"
    b'data: {"text": "a"}\r\n\r\n'
    b"id: 7\ndata:\n\n"
    b"event: token\rdata: two\rdata:lines\r\r"
    b"\n\nretry: 3\n\n" + "data: wörd\n\n".encode() + b"data:[DONE]\n\n"
    b"data: unfinished"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    parser = EventParser()
    places = sorted({0, *cuts, len(STREAM)})
    events = []
    for start, end in itertools.pairwise(places):
        events += parser.feed(STREAM[start:end])
    assert events == EVENTS[:-1]
    assert parser.end() == EVENTS[-1:]
    assert parser.end() == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_there_as_soon_as_its_empty_line_is(end: bytes) -> None:
    parser = EventParser()
    for _ in range(2):
        assert parser.feed(b"data: now" + end) == []
        assert parser.feed(end) == [Event(b"", b"now")]
    assert parser.end() == []


def test_an_empty_chunk_changes_nothing() -> None:
    parser = EventParser()
    assert parser.feed(b"data: x\r") == []
    assert parser.feed(b"") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\r\n") == [Event(b"", b"x")]
