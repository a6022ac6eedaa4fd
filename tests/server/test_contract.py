"""What clients rely on: one event a token, none lost or repeated, then the usage, then [DONE]."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from fastserve.policies.discovery import list_policies

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")

from fastserve.server.options import ServerOptions
from support.servers import DONE, RunningServer, running, simulated, token_ids
from support.tokenizers import of_bytes, of_words

SHORT_OF_CACHE: dict[str, Any] = {"num_blocks": 12, "max_batch_size": 3, "iteration_s": 0.0002}
IMPATIENT = {"fastserve": {"alpha_s": 0.01, "quantum_base_s": 0.001}, "mlfq": {"alpha_s": 0.01}}


def events(server: RunningServer, path: str = "/v1/completions", **body: Any) -> list[Any]:
    """Return all events of a stream before [DONE], which must be the last."""
    stream = server.stream(path, **body)
    *before, last = stream
    assert last == DONE
    assert stream.response.status == 200
    assert stream.response.headers["Content-Type"].startswith("text/event-stream")
    stream.close()
    return before


@pytest.mark.parametrize("policy", sorted(list_policies()))
def test_one_event_a_token_whatever_the_policy_does(policy: str) -> None:
    build = partial(simulated, policy, IMPATIENT.get(policy, {}), **SHORT_OF_CACHE)
    lengths = [1, 2, 100, 60, 30, 90, 100, 75]
    with running(build) as server, ThreadPoolExecutor(len(lengths)) as clients:
        ask = partial(events, server, return_token_ids=True)
        streams = list(clients.map(lambda length: ask(prompt=[7] * 20, max_tokens=length), lengths))
        server.check_empty()
    for length, chunks in zip(lengths, streams, strict=True):
        assert [token_ids(chunk) for chunk in chunks] == [[token] for token in range(length)]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (length - 1) + ["length"]


def test_a_batch_that_runs_to_completion_ends_each_stream_with_its_last_token() -> None:
    with running(partial(simulated, "run-to-completion", iteration_s=0.002)) as server:
        with server.held_when():
            short, long = (server.stream(prompt=[1], max_tokens=n, return_token_ids=True) for n in (3, 60))
            server.until_unfinished(2)
        chunks = [chunk for chunk in short if chunk != DONE]
        assert [token_ids(chunk) for chunk in chunks] == [[0], [1], [2]]
        # It ends with its batch.
        assert min(server.watcher.num_tokens.values()) == 3
        assert max(server.watcher.num_tokens.values()) == 60
        assert long.tokens(60) == list(range(60))
        server.check_empty()


def test_a_stream_without_usage(quick: RunningServer) -> None:
    chunks = events(quick, prompt=[1, 2], max_tokens=3)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": f" {token}", "logprobs": None, "finish_reason": reason, "stop_reason": None}]
        for token, reason in enumerate([None, None, "length"])
    ]
    (head,) = {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}
    assert head[0].startswith("cmpl-")
    assert head[1::2] == ("text_completion", "quick")
    assert not any("usage" in chunk for chunk in chunks)


def test_the_usage_is_an_event_of_its_own(quick: RunningServer) -> None:
    *tokens, last = events(quick, prompt=[1, 2], max_tokens=3, stream_options={"include_usage": True})
    assert len(tokens) == 3
    assert all(chunk["usage"] is None for chunk in tokens)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert last["id"] == tokens[0]["id"]


def test_several_prompts_are_choices_of_one_answer(quick: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": [[1, 2, 3], [4], [5, 6]], "max_tokens": 20, "return_token_ids": True}
    *chunks, last = events(quick, **body, stream_options={"include_usage": True})
    by_choice: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_choice[choice["index"]] += token_ids(chunk)
    assert list(by_choice.values()) == [list(range(20))] * 3
    usage = {"prompt_tokens": 6, "completion_tokens": 60, "total_tokens": 66}
    assert last["usage"] == usage
    whole = quick.post(body).json
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert all(choice["token_ids"] == list(range(20)) for choice in whole["choices"])
    assert whole["usage"] == usage


def test_a_whole_answer(quick: RunningServer) -> None:
    answer = quick.post({"prompt": [1, 2], "max_tokens": 3, "model": "quick", "stop_token_ids": [1]}).json
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": " 0", "finish_reason": "stop", "stop_reason": 1, "logprobs": None}
    ]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_null_counts_as_left_out(quick: RunningServer) -> None:
    names = ["temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_tokens", "n", "logprobs", "echo"]
    answer = quick.post({"prompt": [1], "model": None, **dict.fromkeys(names)})
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 16


def test_what_vllm_bench_serve_sends(quick: RunningServer) -> None:
    body: dict[str, Any] = {
        "model": "quick", "prompt": [1, 2], "max_tokens": 4, "temperature": 0.0, "repetition_penalty": 1.0,
        "logprobs": None, "ignore_eos": True, "some_field_of_its_own": {"a": 1},
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    *chunks, last = events(quick, **body)
    assert len(chunks) == 4
    assert last["usage"]["completion_tokens"] == 4
    (card,) = quick.get("/v1/models").json["data"]
    assert card["id"] == card["root"] == "quick"


@pytest.fixture(scope="module")
def chats() -> Any:
    with running(partial(simulated, tokenizer=of_words(), max_model_len=64)) as server:
        yield server


def test_a_chat_begins_with_the_role(chats: RunningServer) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 3}
    first, *chunks = events(chats, "/v1/chat/completions", **body, return_token_ids=True)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    # The first three tokens of the vocabulary are special.
    assert [token_ids(chunk) for chunk in chunks] == [[3], [4], [5]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"content": f" w{i}"} for i in range(3)]


def test_a_chat_continues_to_the_end_of_the_context(chats: RunningServer) -> None:
    answer = chats.post({"messages": [{"role": "user", "content": "w1 w2"}]}, "/v1/chat/completions").json
    assert answer["usage"]["total_tokens"] == 64
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    (two,) = chats.post(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}], "max_completion_tokens": 5},
        "/v1/chat/completions",
    ).json["choices"]
    assert two["message"]["content"] == " w0 w1 w2 w3 w4"


def test_stop_texts_end_a_stream(chats: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": "w1", "max_tokens": 40, "stop": ["w7 w8", "w70"]}
    chunks = events(chats, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " w0 w1 w2 w3 w4 w5 w6 "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) == 9
    whole = chats.post(body).json
    assert whole["choices"][0]["text"] == " w0 w1 w2 w3 w4 w5 w6 "
    assert whole["usage"]["completion_tokens"] == 9
    chats.check_empty()


def test_a_long_prompt_is_tokenized_beside_the_event_loop() -> None:
    # Longer than what is tokenized at once.
    tokenizer = of_bytes()
    text = "hello " * 2000
    with running(partial(simulated, tokenizer=tokenizer)) as server:
        usage = server.post({"prompt": text, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(text))


def test_the_page_can_be_left_out(quick: RunningServer) -> None:
    page = quick.get("/")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    with running(simulated, ServerOptions(page=False)) as server:
        assert [server.get(path).status for path in ("/", "/page/state", "/health")] == [404, 404, 200]


def test_the_pages_data_is_the_engines_state() -> None:
    with running(partial(simulated, "fastserve", **SHORT_OF_CACHE)) as server, ThreadPoolExecutor(8) as clients:
        with server.held_when():
            asked = [clients.submit(server.post, {"prompt": [1] * 20, "max_tokens": 100}) for _ in range(8)]
            server.until_unfinished(8)
        states: list[dict[str, Any]] = []
        while not states or states[-1]["totals"]["finished"] < 8:
            states.append(server.get("/page/state").json)
        assert all(answer.result().status == 200 for answer in asked)
    for state in states:
        assert len(state["running"]) <= state["max_batch_size"] == 3
        assert 0 <= state["gpu"]["free"] <= state["gpu"]["blocks"] == 12
        waiting = sum(level["fresh"] + level["resident"] + level["away"] for level in state["queues"])
        ended = sum(state["totals"][name] for name in ("finished", "aborted", "failed"))
        assert waiting + ended == state["totals"]["requests"] == 8
    last = states[-1]
    assert (last["gpu"]["free"], last["queues"], last["running"]) == (12, [], [])
    assert [row["finish_reason"] for row in last["recent"]] == ["length"] * 8
    assert all(row["output_tokens"] == 100 for row in last["recent"])
    assert sum(row["preemptions"] for row in last["recent"]) == last["totals"]["preemptions"]


def test_version(quick: RunningServer) -> None:
    assert list(quick.get("/version").json) == ["version"]
