"""The control channel: what is sent arrives whole and in order, and nothing else is taken for a message."""

import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.core.logprobs import Scores, TokenLogprobs
from fastserve.core.request import Request, SamplingParams
from fastserve.kvcache import Direction, Transfer
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.parallel.channel import Channel, ChannelClosed, Message, frame, parse_address
from fastserve.runtime.worker.extras import LogitChanges, PromptTargets, RowExtras
from fastserve.runtime.worker.protocol import copy_frame, parse_copies, parse_run, parse_tokens, run_frame, tokens_frame
from fastserve.runtime.worker.runner import Computed
from support.profiles import share

INT64 = st.integers(-(2**63), 2**63 - 1)


def connected(silence_s: float = 5.0) -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return Channel(client, silence_s), Channel(server, silence_s)


def received(channel: Channel, count: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < count:
        messages += channel.receive()
    return messages


IDS = st.lists(st.integers(0, 99), max_size=3)
EXTRAS = st.builds(
    RowExtras,
    st.none()
    | st.builds(
        LogitChanges,
        allowed=st.none() | IDS,
        forbidden=IDS,
        bias=st.lists(st.tuples(st.integers(0, 99), st.floats(-100, 100)), max_size=3),
        repetition_penalty=st.floats(0.1, 2),
        frequency_penalty=st.floats(-2, 2),
        presence_penalty=st.floats(-2, 2),
        counts=st.dictionaries(st.integers(0, 99), st.integers(0, 9)),
    ),
    st.none() | st.integers(0, 20),
    st.none() | st.builds(PromptTargets, st.integers(0, 9), IDS, st.integers(0, 20)),
)


def as_lists(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {key: as_lists(one) for key, one in value.items()}
    return [as_lists(one) for one in value] if isinstance(value, list | tuple) else value


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.lists(INT64), st.dictionaries(st.sampled_from("abc"), st.text()))))
def test_messages_arrive_whole_and_in_order(messages: list[tuple[str, list[int], dict[str, str]]]) -> None:
    left, right = connected()
    for kind, numbers, fields in messages:
        left.send(kind, numbers, **fields)
    assert received(right, len(messages)) == [Message(kind, fields, numbers) for kind, numbers, fields in messages]
    left.close()
    right.close()


def test_a_long_message_arrives_in_parts() -> None:
    left, right = connected()
    numbers = list(range(1_000_000))
    sender = threading.Thread(target=left.send, args=("long", numbers))
    sender.start()
    (message,) = received(right, 1)
    sender.join()
    assert message.numbers == numbers


def test_threads_may_send_at_a_time() -> None:
    left, right = connected()
    threads = [threading.Thread(target=lambda i=i: [left.send("x", [i] * 100) for _ in range(200)]) for i in range(4)]
    for thread in threads:
        thread.start()
    messages = received(right, 800)
    assert all(len(message.numbers) == 100 and len(set(message.numbers)) == 1 for message in messages)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack("<II", 3, 0) + b"{]}",
        struct.pack("<II", 2, 0) + b"[]",
        struct.pack("<II", 2, 0) + b"{}",
        struct.pack("<II", 0, 2**31),
    ],
)
def test_what_is_no_message_closes_the_channel(data: bytes) -> None:
    left, right = connected()
    left.send_frame(data)
    with pytest.raises(ChannelClosed):
        received(right, 1)


def test_a_closed_channel_says_so() -> None:
    left, right = connected()
    left.send("last")
    left.close()
    assert [message.kind for message in received(right, 1)] == ["last"]
    with pytest.raises(ChannelClosed):
        right.receive()


def test_a_peer_that_takes_nothing_fails_the_sender() -> None:
    left, _right = connected(silence_s=0.3)
    with pytest.raises(ChannelClosed):
        left.send_frame(bytes(1 << 28))


@share(1 / 5)
@given(
    st.lists(
        st.builds(
            SequenceInput,
            st.lists(st.integers(0, 2**31), min_size=1, max_size=5),
            st.integers(0, 4096),
            st.lists(st.integers(0, 2**31), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
def test_an_iteration_survives_the_wire(sequences: list[SequenceInput], data: st.DataObject) -> None:
    sampling = data.draw(
        st.lists(
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.0, 0.7]),
                top_p=st.sampled_from([0.5, 1.0]),
                top_k=st.integers(0, 50),
                seed=st.integers(0, 9),
                min_p=st.sampled_from([0.0, 0.1]),
            ),
            min_size=len(sequences),
            max_size=len(sequences),
        )
    )
    asked = data.draw(st.dictionaries(st.integers(0, len(sequences) - 1), EXTRAS))
    index, there, drawn, extras = parse_run(decoded(run_frame(7, sequences, sampling, asked)))
    assert index == 7
    assert there == sequences
    for one, other in zip(sampling, drawn, strict=True):
        assert other.temperature == one.temperature
        if one.temperature:
            assert (other.top_p, other.top_k, other.seed) == (one.top_p, one.top_k, one.seed)
            assert other.min_p == one.min_p
    assert as_lists(extras or {}) == as_lists(asked)


def test_what_came_of_an_iteration_survives_the_wire() -> None:
    token = TokenLogprobs(7, -0.1234567890123, 3, [(2, -0.01), (5, -0.2)])
    for scores in (None, {0: Scores([], token), 2: Scores([token, token], None)}):
        computed = Computed([7, 8, 9], scores)
        assert parse_tokens(decoded(tokens_frame(5, computed))) == computed


def test_transfers_survive_the_wire() -> None:
    request = Request("a", 0.0, 1)
    transfers = [
        (3, Transfer(request, Direction.OUT, (1, 2), (5, 6), 10)),
        (4, Transfer(request, Direction.IN, (7,), (8,), 10)),
    ]
    assert list(parse_copies(decoded(copy_frame(transfers)))) == [
        (3, Direction.OUT, [1, 2], [5, 6]),
        (4, Direction.IN, [7], [8]),
    ]


def decoded(data: bytes) -> Message:
    left, right = connected()
    left.send_frame(data)
    (message,) = received(right, 1)
    left.close()
    right.close()
    return message


def test_frames_of_the_same_message_are_equal() -> None:
    assert frame("a", [1, 2], b=3) == frame("a", [1, 2], b=3)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:70000"])
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--engine must be HOST:PORT"):
        parse_address(text, "--engine")


def test_addresses() -> None:
    assert parse_address("node-0:29511", "x") == ("node-0", 29511)
    assert parse_address("[::1]:80", "x") == ("::1", 80)
