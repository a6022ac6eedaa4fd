"""Requests that do not arrive whole are answered 408 after the timeout, and delay no other connection."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest

pytest.importorskip("uvicorn")

from fastserve.server.options import ServerOptions
from support.polling import eventually_equal
from support.servers import LONG_S, RunningServer, running, simulated

TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    build = partial(simulated, iteration_s=0.02)
    with running(build, ServerOptions(receive_timeout_s=TIMEOUT_S)) as server:
        yield server
        server.check_empty()


def connected(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=LONG_S)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65_536):
        received += piece
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


HALVES = [
    b"G",
    b"GET /health HTTP/1.1\r\nHost: loc",
    HEAD,
    HEAD + b"Content-Length: 100\r\n\r\n",
    HEAD + b'Content-Length: 100\r\n\r\n{"prompt": [1',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
]


def test_incomplete_requests_are_answered_408(server: RunningServer) -> None:
    with ExitStack() as connections:
        began = time.monotonic()
        sent = []
        for half in HALVES:
            connection = connections.enter_context(closing(connected(server)))
            connection.sendall(half)
            sent.append(connection)
        for connection in sent:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert time.monotonic() - began >= TIMEOUT_S - 0.05
            assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            error = json.loads(body)["error"]
            assert error["message"] == f"the request did not arrive whole within {TIMEOUT_S} s"
    # Requests whose heads are complete are counted, a moment after they are answered.
    eventually_equal(lambda: server.metric("http_requests_total", path="/v1/completions", status="408"), 3)
    assert server.metric("requests_arrived_total") == server.metric("requests_total", outcome="finished")


def test_a_trickle_of_bytes_does_not_lengthen_the_time(server: RunningServer) -> None:
    with closing(connected(server)) as connection:
        began = time.monotonic()
        connection.settimeout(0.05)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        answer = b""
        while not answer:
            connection.sendall(b"X-A: b\r\n")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                assert time.monotonic() - began < LONG_S
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_connection_without_a_request_is_closed(server: RunningServer) -> None:
    with closing(connected(server)) as connection:
        assert read_all(connection) == b""


def test_a_head_may_have_a_large_header_in_any_pieces(server: RunningServer) -> None:
    request = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"a" * 60_000 + b"\r\n\r\n"
    for size in (1000, 40_000, 100_000):
        with closing(connected(server)) as connection:
            for start in range(0, len(request), size):
                connection.sendall(request[start : start + size])
                time.sleep(0.001)
            assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_its_request(server: RunningServer) -> None:
    body = b'{"prompt": [1], "max_tokens": 40}'
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with closing(connected(server)) as connection:
        # The first half of the next request, sent ahead, does not end this answer.
        connection.sendall(whole + HEAD)
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b'"completion_tokens": 40' in received
    assert b"HTTP/1.1 408" in received


def test_a_kept_connection_serves_one_request_after_the_other(server: RunningServer) -> None:
    with closing(connected(server)) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.6 * TIMEOUT_S)
        time.sleep(TIMEOUT_S)  # Between requests only the keep-alive time counts.
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
