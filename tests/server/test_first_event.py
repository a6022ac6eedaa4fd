"""A stream's first event comes with its first token, so a client that times the event measures the token."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")

from prometheus_client.parser import text_string_to_metric_families

from support.servers import RunningServer, running, simulated
from support.tokenizers import of_words

PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
BODIES: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "w1 w2"},
    "chat": {"messages": [{"role": "user", "content": "w1 w2"}]},
}
NUM_AT_ONCE = 24


@pytest.fixture(scope="module")
def busy() -> Iterator[RunningServer]:
    """Two requests run at a time, in order of arrival: most requests wait long for their first token."""
    build = partial(simulated, "fastserve-fcfs", iteration_s=0.002, max_batch_size=2, tokenizer=of_words())
    with running(build) as server:
        yield server


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_nothing_is_sent_while_there_is_no_token(busy: RunningServer, kind: str) -> None:
    content = json.dumps({**BODIES[kind], "max_tokens": 2, "stream": True})
    head = f"POST {PATHS[kind]} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with busy.held_when(), socket.create_connection(("127.0.0.1", busy.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        busy.until_unfinished(1)
        connection.settimeout(0.3)
        received = b""
        with suppress(TimeoutError):
            while chunk := connection.recv(65536):
                received += chunk
        # The head alone.
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(b"\r\n\r\n")
        assert b"data:" not in received
    busy.check_empty()


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_first_event_comes_when_the_metrics_say_the_first_token_came(busy: RunningServer, kind: str) -> None:
    def seconds_to_first_event(_: int) -> float:
        begin = time.perf_counter()
        stream = busy.stream(PATHS[kind], **BODIES[kind], max_tokens=10)
        events = iter(stream)
        next(events)
        seconds = time.perf_counter() - begin
        for _ in events:
            pass
        stream.close()
        return seconds

    total_before, count_before = time_to_first_token(busy)
    with ThreadPoolExecutor(NUM_AT_ONCE) as clients:
        measured = fmean(clients.map(seconds_to_first_event, range(NUM_AT_ONCE)))
    total, count = time_to_first_token(busy)
    assert count - count_before == NUM_AT_ONCE
    counted = (total - total_before) / NUM_AT_ONCE
    # Half of the requests wait for twelve batches of ten iterations: without a token an event would come at once.
    assert counted > 0.05
    # The client's clock starts before the request is sent and stops after the event has come.
    assert counted <= measured <= 2 * counted + 0.5


def time_to_first_token(server: RunningServer) -> tuple[float, float]:
    """Sum in seconds and count of the histogram in /metrics."""
    text = server.get("/metrics").content.decode()
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
    }
    name = "fastserve_time_to_first_token_seconds"
    return samples[f"{name}_sum"], samples[f"{name}_count"]
