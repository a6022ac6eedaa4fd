"""Clients that disconnect, that do not read, or that are too many delay no engine and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from fastserve.kvcache import Location
from fastserve.server.options import ServerOptions
from support.servers import LONG_S, RunningServer, running, simulated, token_ids

ENDLESS = 1600
"""More tokens than a test waits for."""
LONG_PROMPT = [1] * 1550
"""The cache holds two of these prompts, but not their full outputs."""
ONE_PLACE: dict[str, Any] = {
    "max_batch_size": 1,
    "iteration_s": 0.001,
    "num_blocks": 200,
    "num_host_blocks": 1000,
    "policy": "fastserve",
    "policy_options": {"alpha_s": 0.01, "quantum_base_s": 0.001, "swap": "reactive"},
}
"""One request runs at a time, and two take turns."""


@pytest.fixture(params=[True, False], ids=["streamed", "whole"])
def streamed(request: pytest.FixtureRequest) -> bool:
    kind: bool = request.param
    return kind


def ask(server: RunningServer, *, stream: bool, prompt: list[Any], max_tokens: int = ENDLESS) -> HTTPConnection:
    """Send a request and return its connection; closing it disconnects the client."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def leave(server: RunningServer, connection: HTTPConnection, happened: Callable[[], bool], left: int = 0) -> None:
    """Disconnect when this has happened; the engine stands still until the server knows."""
    with server.held_when(happened):
        connection.close()
        server.until_unfinished(left)


def test_a_running_request_is_aborted(streamed: bool) -> None:
    with running(partial(simulated, **ONE_PLACE)) as server:
        connection = ask(server, stream=streamed, prompt=[1] * 50)
        leave(server, connection, lambda: server.watcher.num_tokens.total() > 20)
        server.check_empty()
        (job,) = server.watcher.jobs.values()
        assert job.request.status.value == "aborted"
        assert 20 < job.request.num_output_tokens < ENDLESS


def test_a_waiting_request_is_aborted(streamed: bool) -> None:
    with running(partial(simulated, **(ONE_PLACE | {"policy": "fastserve-fcfs", "policy_options": {}}))) as server:
        first = server.stream(prompt=[1], max_tokens=ENDLESS)
        server.until(lambda: server.watcher.num_tokens.total() > 1)
        waits = ask(server, stream=streamed, prompt=[1])
        leave(server, waits, lambda: len(server.watcher.jobs) == 2, left=1)
        server.until(lambda: server.watcher.outcomes["aborted"] == 1)
        job = list(server.watcher.jobs.values())[1]
        assert (job.request.status.value, job.request.num_output_tokens) == ("aborted", 0)
        first.close()
        server.check_empty()


def test_a_swapped_out_request_is_aborted(streamed: bool) -> None:
    with running(partial(simulated, **ONE_PLACE)) as server:
        connections = [ask(server, stream=streamed, prompt=LONG_PROMPT) for _ in range(2)]
        kv, queue = server.engine.kv, server.engine.scheduler.queue

        def swapped_out() -> list[Any]:
            return [request for request in queue.in_order() if kv.location(request) is Location.HOST]

        with server.held_when(lambda: bool(swapped_out())):
            for connection in connections:
                connection.close()
            server.until_unfinished(0)
        server.check_empty()
        assert server.watcher.outcomes == {"aborted": 2}
        assert sum(job.swap_out_bytes for job in server.watcher.jobs.values()) > 0


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_request_is_aborted_during_its_transfer(direction: str, streamed: bool) -> None:
    with running(partial(simulated, **ONE_PLACE)) as server:
        connections = [ask(server, stream=streamed, prompt=LONG_PROMPT) for _ in range(2)]
        kv = server.engine.kv

        def moves() -> bool:
            return (kv.num_vacating_blocks if direction == "out" else kv.num_arriving_blocks) > 0

        with server.held_when(moves):
            for connection in connections:
                connection.close()
            server.until_unfinished(0)
        server.check_empty()
        assert server.watcher.outcomes == {"aborted": 2}


def test_all_prompts_of_a_request_are_aborted(streamed: bool) -> None:
    with running(partial(simulated, **ONE_PLACE)) as server:
        connection = ask(server, stream=streamed, prompt=[[1], [2], [3]])
        leave(server, connection, lambda: server.watcher.num_tokens.total() > 20)
        server.check_empty()
        assert server.watcher.outcomes == {"aborted": 3}


def test_an_incomplete_body_reaches_no_engine(quick: RunningServer) -> None:
    before = len(quick.watcher.jobs)
    with closing(socket.create_connection(("127.0.0.1", quick.port))) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n"
        )
        connection.sendall(head + b'{"prompt": [1')
        assert quick.post({"prompt": [1]}).status == 200
    assert quick.post({"prompt": [1]}).status == 200
    assert len(quick.watcher.jobs) == before + 2


def test_requests_are_counted_by_outcome() -> None:
    with running(partial(simulated, **ONE_PLACE)) as server:
        assert server.post({"prompt": [1], "max_tokens": 3}).status == 200
        connection = ask(server, stream=True, prompt=[1])
        leave(server, connection, lambda: server.watcher.num_tokens.total() > 10)
        server.check_empty()
        assert server.metric("requests_total", outcome="finished") == 1
        assert server.metric("requests_total", outcome="aborted") == 1
        recent = server.get("/page/state").json["recent"]
        assert [row["finish_reason"] for row in recent] == ["abort", "length"]


# -- a client that does not read -------------------------------------------------------------------------------------


MANY = 2_000


@pytest.fixture
def unread() -> Iterator[tuple[RunningServer, socket.socket]]:
    """A client that reads nothing of an answer larger than sockets hold; the engine has generated all of it."""
    build = partial(simulated, iteration_s=0.00001)
    with running(build, send_buffer=4096) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LONG_S)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps({"prompt": [1], "max_tokens": MANY, "stream": True, "return_token_ids": True}).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        client.sendall(b"POST /v1/completions HTTP/1.0\r\n" + head + body)
        server.until(lambda: server.watcher.outcomes["finished"] == 1)
        yield server, client


def test_an_unread_stream_delays_nothing_and_loses_nothing(
    unread: tuple[RunningServer, socket.socket],
) -> None:
    server, client = unread
    server.check_empty()
    assert server.post({"prompt": [1], "max_tokens": 50}).status == 200
    assert len(server.run(senders())) == 1
    content = b"".join(iter(lambda: client.recv(2**16), b""))
    head, _, events = content.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    *tokens, done = [line.removeprefix(b"data: ") for line in events.split(b"\n") if line.startswith(b"data: ")]
    assert done == b"[DONE]"
    assert [token for event in tokens for token in token_ids(json.loads(event))] == list(range(MANY))


async def senders() -> list[asyncio.Task[Any]]:
    """Return the tasks of the event loop that send a stream."""
    return [task for task in asyncio.all_tasks() if "EventStream._send" in repr(task.get_coro())]


def test_a_client_disconnects_without_reading(unread: tuple[RunningServer, socket.socket]) -> None:
    server, client = unread
    assert len(server.run(senders())) == 1
    client.close()

    async def until_none_sends() -> None:
        while await senders():
            await asyncio.sleep(0.001)

    server.run(asyncio.wait_for(until_none_sends(), LONG_S))
    server.check_empty()
    assert server.watcher.outcomes == {"finished": 1}


# -- a full queue ----------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_try_again() -> None:
    build = partial(simulated, **ONE_PLACE)
    with running(build, ServerOptions(max_requests=4)) as server:
        for _ in range(3):  # So that it knows how fast requests leave.
            assert server.post({"prompt": [1], "max_tokens": 2}).status == 200
        three = server.stream(prompt=[[1]] * 3, max_tokens=ENDLESS)
        server.until(lambda: len(server.watcher.jobs) == 6)
        for path, body in (
            ("/v1/completions", {"prompt": [[1], [2]]}),
            ("/v1/completions", {"prompt": [[1], [2]], "stream": True}),
        ):
            reply = server.post(body, path)
            assert reply.status == 429
            seconds = int(reply.headers["retry-after"])
            assert 1 <= seconds <= 60
            assert reply.error == {
                "message": f"the queue is full: 3 of 4 requests are unfinished; try again in {seconds} s",
                "type": "rate_limit_error",
                "param": None,
                "code": "queue_full",
            }
        assert server.post({"prompt": [1], "max_tokens": 1}).status == 200
        assert server.metric("requests_refused_queue_full_total") == 4
        three.close()
        server.until_unfinished(0)
        assert server.post({"prompt": [[1]] * 4, "max_tokens": 1}).status == 200
        server.check_empty()


def test_before_a_request_has_finished_the_estimate_is_the_time_that_the_first_has_waited() -> None:
    with running(partial(simulated, **ONE_PLACE), ServerOptions(max_requests=1)) as server:
        assert server.server.engine.retry_after_s(1) == 1
        stream = server.stream(prompt=[1], max_tokens=ENDLESS, return_token_ids=True)
        assert stream.tokens(1) == [0]
        time.sleep(1.05)
        assert 2 <= int(server.post({"prompt": [1]}).headers["retry-after"]) <= 60
        stream.close()
        server.check_empty()
