"""No request, whatever its body, holds up other streams for more than 200 ms or takes more than 200 MB."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")

from support.hostile import (
    CHAT,
    HEADS,
    HOSTILE,
    MIB,
    TEXT,
    Cost,
    Watched,
    exchange,
    message_of,
    post,
    post_chunks,
    watched,
)
from support.servers import LONG_S, Command, command, profile
from support.tokenizers import of_bytes

MOST_GAP_S = 0.2
MOST_BYTES = 200 * 10**6
ATTEMPTS = 5
"""A machine may be busy for a moment; what a request costs, it costs each time."""
CONTEXT = 131_072
"""Of which a body may be 4 MiB."""
LARGEST = 4 * MIB
SIZES = [2**16, 2**19, LARGEST]
"""The two smaller sizes are within the bounds on a body's parts, or just beyond."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Iterations take 5 ms whatever they compute, so only the server's own work can hold up a stream."""
    directory = tmp_path_factory.mktemp("hostile")
    of_bytes().save_pretrained(directory / "tokenizer")
    profile(0.005, num_blocks=40_000).save(directory / "quick.json")
    arguments = ["--backend", "sim", "--profile", str(directory / "quick.json"), "--policy", "vllm", "--no-page"]
    options = {"max_batch_size": 2048, "max_model_len": CONTEXT, "token_budget": 2**20}
    settings = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    with command(*arguments, *settings, "--tokenizer", str(directory / "tokenizer"), lifetime_s=15 * LONG_S) as started:
        yield started


@pytest.fixture(scope="module")
def stream(server: Command) -> Iterator[Watched]:
    with watched(server.port, server.process.pid) as stream:
        # One-time work is done after this.
        stream.cost([post(TEXT, json.dumps({"prompt": "a b " * 50_000, "max_tokens": 1}).encode())])
        yield stream


def bounded_cost(stream: Watched, request: list[bytes]) -> Cost:
    """Return what a request costs. At least one attempt must be within the bounds."""
    costs = []
    usual_s = 0.0
    for attempt in range(ATTEMPTS):
        if attempt:  # The machine may be busy: how long does it keep the stream waiting without a request?
            start = time.perf_counter()
            time.sleep(0.1)
            usual_s = stream.longest_gap_s(start)
        cost = stream.cost(request)
        if cost.gap_s < MOST_GAP_S + usual_s and cost.num_bytes < MOST_BYTES:
            return cost
        costs.append(f"{cost.gap_s:.3f} s where it is {usual_s:.3f} s, {cost.num_bytes / 1e6:.0f} MB")
    raise AssertionError(f"a request held up a stream or filled the memory: {', '.join(costs)}")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_body_holds_up_a_stream_or_fills_the_memory(stream: Watched, name: str) -> None:
    path, make = HOSTILE[name]
    for size in SIZES:
        body = make(size)
        assert len(body) <= size
        cost = bounded_cost(stream, [post(path, body)])
        assert cost.status in (200, 400, 404)
        if cost.status != 200:
            assert 10 < len(message_of(cost.answer)) < 500


@pytest.mark.parametrize("name", ["texts, the last a number", "lists of one id"])
def test_a_larger_body_is_not_read(stream: Watched, name: str) -> None:
    path, make = HOSTILE[name]
    cost = bounded_cost(stream, [post(path, make(31 * MIB))])
    assert cost.status == 413


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(stream: Watched) -> None:
    cost = bounded_cost(stream, [post(TEXT, b"{", length=10**18)])
    assert cost.status == 413
    assert "larger than 4194304 bytes" in message_of(cost.answer)


def test_a_body_in_many_small_chunks(stream: Watched) -> None:
    path, make = HOSTILE["text: words"]
    assert bounded_cost(stream, [post_chunks(path, make(MIB), 1)]).status == 400
    assert bounded_cost(stream, [post_chunks(path, b" " * (LARGEST + 1), 1000)]).status == 413


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_bounded_too(stream: Watched, name: str) -> None:
    cost = bounded_cost(stream, [HEADS[name](32 * MIB)])
    assert cost.status == 431
    assert "URL and headers are longer than 65536 bytes" in message_of(cost.answer)


WORD = "a b "
VALID: dict[str, tuple[str, dict[str, Any], int]] = {
    "one prompt of ids": (TEXT, {"prompt": [5] * (CONTEXT - 1)}, CONTEXT - 1),
    "many prompts of ids": (TEXT, {"prompt": [[5] * 250] * 1024}, 256_000),
    "one text": (TEXT, {"prompt": WORD * (CONTEXT // 4 - 1)}, CONTEXT - 4),
    "many texts": (TEXT, {"prompt": [WORD * 50] * 1024}, 204_800),
    "many messages": (CHAT, {"messages": [{"role": "user", "content": WORD}] * 4096}, 0),
    "many parts": (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": WORD}] * 1000}] * 10}, 0,
    ),
}  # fmt: skip
"""Each with its number of prompt tokens; 0: not known."""


@pytest.mark.parametrize("name", VALID)
def test_the_largest_requests_are_served_without_holding_up_a_stream(stream: Watched, name: str) -> None:
    path, body, num_tokens = VALID[name]
    cost = bounded_cost(stream, [post(path, json.dumps({**body, "max_tokens": 1}).encode())])
    assert cost.status == 200, message_of(cost.answer)
    usage = json.loads(cost.answer)["usage"]
    assert num_tokens in (0, usage["prompt_tokens"])
    assert usage["completion_tokens"] == len(body.get("prompt", [[]])) if name.startswith("many p") else 1


def test_the_answer_to_many_prompts_holds_up_nothing(stream: Watched) -> None:
    body = {"prompt": [[5]] * 256, "max_tokens": 100, "return_token_ids": True, "n": 4}
    cost = bounded_cost(stream, [post(TEXT, json.dumps(body).encode())])
    choices = json.loads(cost.answer)["choices"]
    assert [len(choice["token_ids"]) for choice in choices] == [100] * 1024


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": [[5] * 9] * 513, "n": 2}, "n", "2 outputs for each of 513 prompts are more than 1024"),
        ({"prompt": [5] * (CONTEXT - 1), "n": 20}, "n", "counted for each of the n outputs, are more than 262144"),
    ],
)
def test_choices_are_bounded(stream: Watched, body: dict[str, Any], param: str, says: str) -> None:
    cost = bounded_cost(stream, [post(TEXT, json.dumps({**body, "max_tokens": 1}).encode())])
    assert cost.status == 400
    assert json.loads(cost.answer)["error"]["param"] == param
    assert says in message_of(cost.answer)


def test_many_bodies_at_once_are_bounded_together(server: Command, stream: Watched) -> None:
    path, make = HOSTILE["text: characters of four bytes"]
    num_clients = 24
    body = make(LARGEST)
    half = len(body) // 2
    all_have_sent_half = threading.Barrier(num_clients)

    def pieces() -> Iterator[bytes]:
        yield post(path, body)[:-half]
        all_have_sent_half.wait(LONG_S)
        yield body[-half:]

    def ask(_: int) -> tuple[int, bytes]:
        return exchange(server.port, pieces())

    with ThreadPoolExecutor(num_clients) as clients:
        before = stream.start_measuring()
        answers = list(clients.map(ask, range(num_clients)))
        assert stream.num_bytes() < 2 * MOST_BYTES
        assert stream.longest_gap_s(before) < 1
    refusals = Counter(status for status, _ in answers)
    assert set(refusals) == {400, 503}
    assert refusals[503] >= num_clients - 32 * MIB // half
    full = next(answer for status, answer in answers if status == 503)
    assert json.loads(full)["error"]["code"] == "bodies_full"
    # Nothing of them is held any more.
    assert stream.cost([post(path, body)]).status == 400
