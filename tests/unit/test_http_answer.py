"""What a client can tell from a streamed answer, and what it leaves undefined."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.request import RequestStatus
from harness.client.answer import BrokenAnswer, Exchange
from harness.client.sse import Event

STEP = 0.010
"""Seconds from a token to the next of the answers below, and from the first one's request to it ten times that."""


def event(text: str | None = " w", at: float = 0.0, usage: int | None = None, **content: Any) -> tuple[float, Event]:
    """An event of a completion; no choice without a text."""
    choices = [] if text is None else [{"index": 0, "text": text, **content}]
    said = None if usage is None else {"prompt_tokens": 7, "completion_tokens": usage}
    return at, Event(b"", json.dumps({"choices": choices, "usage": said}).encode())


def raw(content: str | dict[str, Any], at: float = 0.0, kind: bytes = b"") -> tuple[float, Event]:
    return at, Event(kind, (content if isinstance(content, str) else json.dumps(content)).encode())


def time_of(token: int) -> float:
    return STEP * (10 + token)


def one_each(num_tokens: int) -> list[tuple[float, Event]]:
    return [event(at=time_of(i)) for i in range(num_tokens)]


def answer(*events: tuple[float, Event], max_tokens: int = 20) -> Exchange:
    exchange = Exchange("0", 0.0, 5, max_tokens)
    for at, each in events:
        if exchange.take(each, at):
            break
    exchange.end(RequestStatus.FINISHED, "")
    return exchange


def told(exchange: Exchange) -> tuple[float, ...]:
    """TTFT, TPOT, longest gap and completion time in milliseconds."""
    times = (exchange.first_token_s, exchange.tpot_s, exchange.max_token_gap_s, exchange.finished_s)
    return tuple(round(1000 * each, 6) for each in times)


UNDEFINED = pytest.approx(math.nan, nan_ok=True)
STEADY = (100, 10, 10, 290)
"""What is told of twenty tokens, one a step."""


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([*one_each(20), event(None, usage=20)], STEADY),
        ([*one_each(20)], STEADY),
        # An event is no token: not an empty first one, and not an empty last one, however late.
        ([event("", 0.0066), *one_each(20), event(None, usage=20)], STEADY),
        ([*one_each(20), event("", 0.9, finish_reason="length"), event(None, usage=20)], STEADY),
        ([*one_each(20), event("", 0.9, usage=20, finish_reason="length")], STEADY),
        # Unless the server says so.
        ([event("", time_of(i), usage=i + 1) for i in range(20)], STEADY),
        ([event("", time_of(i), token_ids=[i]) for i in range(20)], STEADY),
        ([event("", 0.001, usage=0), *(event(at=time_of(i), usage=i + 1) for i in range(20))], STEADY),
        ([*one_each(19), event("", time_of(19), usage=20, finish_reason="stop")], STEADY),
        ([*one_each(19), event("", time_of(19), finish_reason="stop"), event(None, usage=20)], STEADY),
        # Four tokens an event: the first four were generated before the first event.
        ([event(at=time_of(i), usage=i + 1) for i in range(3, 20, 4)], (130, 10, 40, 290)),
        ([event(at=time_of(i), token_ids=[1, 2, 3, 4]) for i in range(3, 20, 4)], (130, 10, 40, 290)),
        # The server does not say which tokens came when.
        ([*(event(at=time_of(i)) for i in range(3, 20, 4)), event(None, usage=20)], (130, UNDEFINED, UNDEFINED, 290)),
        ([*(event(at=time_of(i)) for i in range(3, 20, 4)), event("", 0.3, finish_reason="length")],
         (130, UNDEFINED, UNDEFINED, 300)),
        ([*(event("w", at=time_of(i) / 2) for i in range(40)), event(None, usage=20)],
         (50, UNDEFINED, UNDEFINED, 245)),
        # All at once: in one event, or in one read, or in a few that follow each other at once.
        ([event(at=0.3, usage=20)], (UNDEFINED, UNDEFINED, UNDEFINED, 300)),
        ([event(at=0.3), event(None, usage=20)], (UNDEFINED, UNDEFINED, UNDEFINED, 300)),
        ([event(at=0.3)], (UNDEFINED, UNDEFINED, 0, 300)),
        ([*(event(at=0.3) for _ in range(20)), event(None, usage=20)], (UNDEFINED, UNDEFINED, UNDEFINED, 300)),
        ([*(event(at=0.3) for _ in range(10)), *(event(at=0.3015) for _ in range(10)), event(None, usage=20)],
         (UNDEFINED, UNDEFINED, UNDEFINED, 301.5)),
        # A usage that does not run, and one only in the first event.
        ([*(event(at=time_of(i), usage=0) for i in range(20)), event(None, usage=20)], STEADY),
        ([*(event(at=time_of(i), usage=1) for i in range(20)), event(None, usage=20)], STEADY),
        ([*(event(at=time_of(i), usage=20) for i in range(20))], STEADY),
        # Text that was kept back comes with the end, and is no further token.
        ([*(event(at=time_of(i), usage=i + 1) for i in range(20)),
          event("w", 0.5, usage=20, finish_reason="stop")], STEADY),
        ([event(at=time_of(0), usage=1), *one_each(20)[1:], event("", 0.9, usage=20, finish_reason="length")], STEADY),
        # No text at all.
        ([event("", 0.1), event("", 0.2, finish_reason="stop"), event(None, usage=3)],
         (UNDEFINED, UNDEFINED, UNDEFINED, 200)),
        ([event(at=0.1, finish_reason="stop"), event(None, usage=1)], (100, UNDEFINED, 0, 100)),
    ],
)  # fmt: skip
def test_times(events: list[tuple[float, Event]], expected: tuple[float, ...]) -> None:
    assert told(answer(*events)) == tuple(expected)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=60), st.floats(0.001, 1.0))
def test_the_time_per_token_does_not_depend_on_how_many_tokens_an_event_holds(sizes: list[int], step: float) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    exchange = answer(*(event(at=1 + step * end, usage=end) for end in ends), max_tokens=ends[-1])
    assert exchange.tpot_s == pytest.approx(step)
    assert exchange.max_token_gap_s == pytest.approx(step * max(sizes[1:]))
    assert exchange.event_tokens is not None
    assert (list(exchange.event_tokens), exchange.output_tokens) == (sizes, ends[-1])


@given(st.integers(2, 400), st.data())
def test_tokens_that_do_not_show_change_the_time_per_token_by_a_twentieth_at_most(num_tokens: int, data: Any) -> None:
    """Some tokens have no text. The first and the last have, and so the true time is known."""
    hidden = data.draw(st.sets(st.integers(1, max(1, num_tokens - 2)), max_size=num_tokens // 10))
    shown = [i for i in range(num_tokens) if i not in hidden]
    exchange = answer(*(event(at=time_of(i)) for i in shown), event(None, usage=num_tokens), max_tokens=num_tokens)
    if math.isnan(exchange.tpot_s):
        assert (num_tokens - 1) / (len(shown) - 1 or math.nan) > 1.05 or len(shown) < 2
    else:
        assert exchange.tpot_s == pytest.approx(STEP, rel=0.05)


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        ([*one_each(3), event(None, usage=9)], 9),
        ([*one_each(3), event(None, usage=0)], 3),
        ([*one_each(3)], 3),
        ([*one_each(3), event("", 0.2, finish_reason="stop")], 3),
        ([*one_each(3), event("", 0.2, finish_reason="length")], 20),
        ([*one_each(3), raw({"choices": [], "usage": {"completion_tokens": "many"}})], 3),
        ([*one_each(3), raw({"usage": {"completion_tokens": 4}})], 4),
        ([event(token_ids=[1, 2]), event(token_ids=[3])], 3),
        ([event(token_ids=[1, 2]), event(token_ids=[3], finish_reason="length")], 3),
    ],
)
def test_output_tokens(events: list[tuple[float, Event]], tokens: int) -> None:
    assert answer(*events).output_tokens == tokens


@pytest.mark.parametrize(
    ("delta", "num_tokens"),
    [
        ({"role": "assistant"}, 0),
        ({"role": "assistant", "content": ""}, 0),
        ({}, 0),
        ({"content": None, "tool_calls": None, "refusal": None}, 0),
        ({"role": "assistant", "content": "w"}, 1),
        ({"reasoning_content": "w"}, 1),
        ({"reasoning": "w", "content": ""}, 1),
        ({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}, 1),
        ({"content": [{"type": "thinking", "thinking": "w"}]}, 1),
        ({"refusal": "no"}, 1),
    ],
)
def test_what_of_a_chat_is_a_token(delta: dict[str, Any], num_tokens: int) -> None:
    exchange = Exchange("0", 0.0, 5, 20)
    exchange.take(raw({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})[1], 0.1)
    assert (exchange.shown_tokens, len(exchange.token_s)) == (num_tokens, num_tokens)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"},
        {"choices": [], "usage": None},
        {"choices": None},
        {"type": "ping"},
        {"choices": [], "prompt_filter_results": [{}]},
    ],
)
def test_events_that_hold_nothing_are_skipped(content: dict[str, Any]) -> None:
    events = one_each(20)
    assert told(answer(*events[:7], raw(content, 0.17), *events[7:], raw(content, 0.9))) == STEADY


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (raw({"error": {"message": "lost a rank"}}), "lost a rank"),
        (raw({"error": "lost", "choices": [{"index": 0, "finish_reason": "error"}]}), "lost"),
        (raw({"object": "error", "message": "too long", "code": 400}), "too long"),
        (raw({"message": "overloaded"}, kind=b"error"), "overloaded"),
        (raw("oops"), "oops"),
        (raw("3"), "3"),
        (raw("[" * 100_000), "[[["),
        (raw({"choices": {"text": "w"}}), '{"choices": {"text": "w"}}'),
    ],
)
def test_events_that_may_hold_tokens_and_cannot_be_read_break_the_answer(
    broken: tuple[float, Event], message: str
) -> None:
    exchange = Exchange("0", 0.0, 5, 20)
    with pytest.raises(BrokenAnswer) as caught:
        exchange.take(broken[1], 0.1)
    assert message in str(caught.value)


def test_a_finish_reason_is_an_end_and_an_abort_is_none() -> None:
    finished = Exchange("0", 0.0, 5, 20)
    finished.take(event(finish_reason="length")[1], 0.1)
    finished.end(RequestStatus.ABORTED, "unfinished")
    assert (finished.status, finished.error) == ("finished", "")
    aborted = answer(event(at=0.1), event("", 0.2, finish_reason="abort"))
    assert (aborted.status, aborted.error) == ("failed", "the server ended it early: finish_reason 'abort'")
    empty = answer(event("", finish_reason="stop"))
    assert (empty.status, empty.error) == ("failed", "the stream held no token")


def test_the_end_is_decided_once() -> None:
    exchange = answer(*one_each(20))
    exchange.end(RequestStatus.ABORTED, "late")
    exchange.fail("later")
    assert (exchange.status, exchange.error) == ("finished", "")
