"""`fastbench run --backend http`, against a scripted server on a real socket. Nothing depends on how fast it all is."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from fastserve.engine import IterationRecord
from fastserve.errors import ConfigError, FastServeError, ServerError
from harness import http_replay
from harness.capacity_search import Objective, find_capacity
from harness.http_server import message_of
from harness.results import CLIENT_COLUMNS, REQUEST_COLUMNS
from harness.runner import RunConfig, run
from harness.workload import make_workload
from support.openai_server import (
    DONE,
    Call,
    OpenAIServer,
    Script,
    complete,
    never,
    refuse,
    say,
    token,
    usage,
)
from workflow.test_fastbench_run import SUMMARY_KEYS, invoke

ROOT = Path(__file__).parents[2]
TRACE = "fixed:prompt=5,output=4"


def config(url: str, **changes: Any) -> RunConfig:
    return RunConfig(**{"backend": "http", "url": url, "trace": TRACE, "rate": 200.0, "num_requests": 4} | changes)


def replayed(server: OpenAIServer, out: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the rows of a run against the server."""
    with server.running() as url:
        summary = run(config(url, **changes), out)
    return summary, rows_of(out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "requests.parquet").to_pylist()


def meta_of(out: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((out / "meta.json").read_text())
    return meta


def test_the_four_files_are_those_of_the_other_backends(tmp_path: Path) -> None:
    summary, rows = replayed(OpenAIServer(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "requests.parquet", "iterations.parquet", "summary.json", "meta.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary) == SUMMARY_KEYS | {"p99_send_lateness_s", "max_send_lateness_s"}
    assert (summary["policy"], summary["backend"], summary["finished"], summary["failed"]) == ("someone", "http", 4, 0)
    assert list(rows[0]) == [*REQUEST_COLUMNS, *CLIENT_COLUMNS]
    workload = make_workload(TRACE, "poisson", 200.0, 4, 0)
    for i, row in enumerate(rows):
        assert (row["request_id"], row["status"]) == (str(i), "finished")
        assert (row["prompt_tokens"], row["output_tokens"]) == (5, 4)
        assert row["arrival_s"] == workload.arrival_s[i]
        times = [row["arrival_s"], row["sent_s"], *row["token_s"]]
        assert times == sorted(times)
        assert (row["first_token_s"], row["finished_s"]) == (row["token_s"][0], row["token_s"][3])
        unseen = ("first_scheduled_s", "queueing_s", "swapping_s", "execution_s", "preemptions", "swap_out_bytes")
        assert {row[name] for name in (*unseen, "swap_in_bytes", "recomputed_tokens")} == {None}
    assert summary["mean_ttft_s"] == pytest.approx(np.mean([r["first_token_s"] - r["arrival_s"] for r in rows]))
    assert summary["mean_max_token_gap_s"] == pytest.approx(np.mean([np.diff(r["token_s"]).max() for r in rows]))
    iterations = pq.read_table(tmp_path / "iterations.parquet")
    assert (iterations.num_rows, tuple(iterations.column_names)) == (0, IterationRecord._fields)
    meta = meta_of(tmp_path)
    assert meta["configuration"]["vocab_size"] == http_replay.DEFAULT_VOCABULARY
    assert meta["configuration"]["model"] == "tiny"
    assert "device" not in meta["configuration"]
    assert meta["trace"]["digest"] == workload.digest
    assert (meta["failed"], meta["rejected"], meta["error"]) == ([], [], None)


def test_what_is_asked_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    card = {"id": "big", "vocab_size": 3, "owned_by": "someone"}
    server = OpenAIServer(models={"data": [{"id": "tiny"}, card]}, version="1.2")
    replayed(server, tmp_path, model="big", num_requests=2)
    workload = make_workload(TRACE, "poisson", 200.0, 2, 0)
    asked = {call.name: call.body for call in server.calls}
    assert asked == {
        str(i): {
            "model": "big",
            "prompt": workload.prompt_token_ids(i, 3),
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(2)
    }
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}
    meta = meta_of(tmp_path)
    assert meta["server"] == {"version": "1.2", "model": card}
    assert server.calls[0].request.headers["X-Request-ID"].startswith(meta["client"]["run_id"])
    assert not any("sesame" in (tmp_path / name).read_text() for name in ("meta.json", "summary.json"))


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_url_is_recorded_without_credentials_and_may_end_in_v1(tmp_path: Path, suffix: str) -> None:
    server = OpenAIServer()
    with server.running() as url:
        run(config(url.replace("//", "//me:sesame@") + suffix, num_requests=1), tmp_path)
    assert meta_of(tmp_path)["configuration"]["url"] in (url, f"{url}/")
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert "sesame" not in (tmp_path / "meta.json").read_text()


def test_an_own_vocabulary_wins_over_that_of_the_server(tmp_path: Path) -> None:
    server = OpenAIServer(models={"data": [{"id": "tiny", "vocab_size": 50_000}]})
    replayed(server, tmp_path, vocab_size=1)
    assert {tuple(call.body["prompt"]) for call in server.calls} == {(0,) * 5}
    assert meta_of(tmp_path)["configuration"]["vocab_size"] == 1


def test_prompts_as_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(7)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    server = OpenAIServer()
    replayed(server, tmp_path / "out", prompts="text", tokenizer=str(tmp_path), num_requests=1)
    ids = make_workload(TRACE, "poisson", 200.0, 1, 0).prompt_token_ids(0, 7)
    assert server.calls[0].body["prompt"] == " ".join(f"w{i}" for i in ids)
    assert rows_of(tmp_path / "out")[0]["prompt_tokens"] == len(server.calls[0].body["prompt"])  # as the server says


def test_requests_are_sent_on_schedule_though_none_is_answered(tmp_path: Path) -> None:
    """The server answers nobody until all have asked: a client that waited for answers would never end."""

    async def script(call: Call) -> web.StreamResponse:
        await call.others(50)
        return await complete(call)

    summary, rows = replayed(OpenAIServer(script), tmp_path, num_requests=50, rate=500.0)
    assert summary["finished"] == 50
    assert [row["arrival_s"] for row in rows] == make_workload(TRACE, "poisson", 500.0, 50, 0).arrival_s.tolist()
    assert all(row["sent_s"] >= row["arrival_s"] for row in rows)
    assert max(row["sent_s"] for row in rows) < min(row["first_token_s"] for row in rows)
    late = [row["sent_s"] - row["arrival_s"] for row in rows]
    assert summary["max_send_lateness_s"] == pytest.approx(max(late))
    assert summary["p99_send_lateness_s"] == pytest.approx(np.percentile(late, 99))


def test_a_late_client_counts_as_latency_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleep, slept = asyncio.sleep, []

    async def overslept(seconds: float) -> None:
        slept.append(seconds)
        await sleep(seconds + 0.05)

    monkeypatch.setattr(http_replay.asyncio, "sleep", overslept)
    summary, rows = replayed(OpenAIServer(), tmp_path, arrivals="constant", rate=1000.0)
    assert [row["arrival_s"] for row in rows] == [0.001, 0.002, 0.003, 0.004]
    assert min(row["sent_s"] for row in rows) >= 0.05
    assert summary["p50_ttft_s"] > 0.04
    assert summary["max_send_lateness_s"] >= 0.049
    assert len([seconds for seconds in slept if seconds]) == 1, "those that have become due meanwhile are sent at once"
    assert "warning: requests were sent up to" in capsys.readouterr().err


def test_a_cap_on_concurrency_counts_as_latency_and_not_as_lateness(tmp_path: Path) -> None:
    async def script(call: Call) -> web.StreamResponse:
        await call.others(2)
        return await complete(call)

    server = OpenAIServer(script)
    summary, rows = replayed(server, tmp_path, num_requests=10, rate=1e6, max_concurrency=2)
    assert summary["finished"] == 10
    assert server.most_active == 2
    sent, ends = (sorted(row[name] for row in rows) for name in ("sent_s", "finished_s"))
    assert all(next_sent > end for next_sent, end in zip(sent[2:], ends, strict=False))
    assert summary["max_send_lateness_s"] < max(row["sent_s"] - row["arrival_s"] for row in rows)
    assert meta_of(tmp_path)["client"]["max_connections"] == 2


def test_too_few_open_files_are_a_cap_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_replay.resource, "getrlimit", lambda _: (101, 102))
    limits = []
    monkeypatch.setattr(http_replay.resource, "setrlimit", lambda _, limit: limits.append(limit))
    server = OpenAIServer()
    replayed(server, tmp_path, rate=1e6, num_requests=10)
    assert limits == [(102, 102)]
    assert server.most_active <= 2
    assert "waited for one of 2 connections, all that the limit on open files leaves" in capsys.readouterr().err


# -- answers ---------------------------------------------------------------------------------------------------------


def dribble(data: bytes) -> Script:
    """The stream byte by byte."""
    return say(*(data[i : i + 1] for i in range(len(data))))


OF_TWO = token() + token() + usage(5, 2) + DONE
GOOD: dict[str, tuple[Script, int, int]] = {
    "in one piece": (say(OF_TWO), 2, 2),
    "byte by byte": (dribble(OF_TWO), 2, 2),
    "with carriage returns": (say(OF_TWO.replace(b"\n", b"\r\n")), 2, 2),
    "with comments and without spaces": (say(b": ping\n\n", OF_TWO.replace(b"data: ", b"data:")), 2, 2),
    "without usage": (say(token(), token(), token(), DONE), 3, 3),
    "several tokens an event": (say(token(" a b"), usage(5, 4), DONE), 1, 4),
    "no text yet": (say(token(""), token(), DONE), 2, 2),
}


@pytest.mark.parametrize("name", GOOD)
def test_streams_that_can_be_read(tmp_path: Path, name: str) -> None:
    script, num_events, num_tokens = GOOD[name]
    summary, (row,) = replayed(OpenAIServer(script), tmp_path, num_requests=1)
    assert (summary["finished"], row["output_tokens"], len(row["token_s"])) == (1, num_tokens, num_events)
    assert row["token_s"] == sorted(row["token_s"])
    assert math.isfinite(summary["mean_jct_s"])


async def break_off(call: Call) -> web.StreamResponse:
    response = await call.stream(token(), token())
    call.cut()
    return response


BAD: dict[str, tuple[Script, str, str]] = {
    "full": (refuse(429, {"error": {"message": "queue is full"}}), "rejected", "HTTP 429: queue is full"),
    "bad": (refuse(400, {"object": "error", "message": "too long"}), "rejected", "HTTP 400: too long"),
    "unknown": (refuse(404, {"detail": "Not Found"}), "rejected", "HTTP 404: Not Found"),
    "broken": (refuse(500, {"error": "out of memory"}), "failed", "HTTP 500: out of memory"),
    "elsewhere": (refuse(307, {}, Location="/v1/models"), "failed", "HTTP 307: {}"),
    "cut": (break_off, "failed", "connection failed: "),
    "error event": (say(token(), b'data: {"error": {"message": "lost a rank"}}\n\n', DONE), "failed", "1 tokens: lost"),
    "both": (say(b'data: {"choices": [{}], "error": {"message": "gone"}}\n\n'), "failed", "after 0 tokens: gone"),
    "short": (say(token(), usage(5, 1)), "failed", "the stream (text/event-stream) ended before [DONE]"),
    "empty": (say(DONE), "failed", "the stream held no token"),
    "no JSON": (say(token(), b"data: oops\n\n", DONE), "failed", "after 1 tokens: oops"),
    "no object": (say(b"data: 3\n\n"), "failed", "after 0 tokens: 3"),
    "no stream": (refuse(200, {"choices": [{"text": "w w"}]}), "failed", "(application/json) ended before [DONE]"),
}


def test_requests_that_fail_are_counted_and_explained_and_stop_no_other(tmp_path: Path) -> None:
    names = list(BAD)
    scripts = {str(2 * i): BAD[name][0] for i, name in enumerate(names)}
    num_requests = 2 * len(names)
    summary, rows = replayed(OpenAIServer(scripts=scripts), tmp_path, num_requests=num_requests)
    assert (summary["finished"], summary["failed"]) == (len(names), len(names))
    meta = meta_of(tmp_path)
    for i, name in enumerate(names):
        _, status, reason = BAD[name]
        assert rows[2 * i + 1]["status"] == "finished"
        assert (rows[2 * i]["status"], rows[2 * i]["finished_s"]) == (status, None), name
        (said,) = [line for line in meta[status] if line.startswith(f"request {2 * i}: ")]
        assert reason in said, name
    assert rows[2 * names.index("cut")]["output_tokens"] == 2
    assert rows[0]["first_token_s"] is None


def test_if_nothing_finishes_the_files_are_there_and_the_first_cause_is_said(tmp_path: Path) -> None:
    server = OpenAIServer(refuse(400, {"error": {"message": "no token ids, please"}}))
    with pytest.raises(ServerError, match=r"not one of 4 requests finished; request 0: HTTP 400: no token ids, please"):
        replayed(server, tmp_path)
    assert {row["status"] for row in rows_of(tmp_path)} == {"rejected"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"], summary["mean_jct_s"]) == (0, 4, None)
    assert meta_of(tmp_path)["error"].startswith("not one of 4")


def test_a_server_that_is_gone_fails_what_is_sent_to_it(tmp_path: Path) -> None:
    """It closes its door after saying what it serves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer_two() -> None:
            for body in (b'{"data": [{"id": "tiny"}]}', b"{}"):
                connection, _ = listener.accept()
                if body == b"{}":
                    listener.close()
                with connection:
                    connection.recv(65536)
                    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)

        thread = threading.Thread(target=answer_two)
        thread.start()
        with pytest.raises(ServerError, match=r"request 0: .*Cannot connect"):
            run(config(url), tmp_path)
        thread.join()
    assert {(row["status"], row["sent_s"]) for row in rows_of(tmp_path)} == {("failed", None)}


def test_what_is_unfinished_at_the_drain_limit_is_aborted(tmp_path: Path) -> None:
    server = OpenAIServer(never)
    with server.running() as url:
        with pytest.raises(ServerError, match=r"unfinished 0\.2 s after the last arrival"):
            run(config(url, drain_limit_s=0.2), tmp_path)
        assert {server.left.get(timeout=60) for _ in server.calls} == {call.name for call in server.calls}
    assert {(row["status"], row["finished_s"]) for row in rows_of(tmp_path)} == {("aborted", None)}
    assert len(meta_of(tmp_path)["failed"]) == 4


def test_an_answer_that_is_done_is_finished_though_its_connection_stays_open(tmp_path: Path) -> None:
    async def script(call: Call) -> web.StreamResponse:
        await call.stream(token(), DONE)
        return await asyncio.Future()

    summary, _ = replayed(OpenAIServer(script), tmp_path, num_requests=1)
    assert summary["finished"] == 1


def test_other_lengths_than_asked_for_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {"1": say(token(), DONE)}
    replayed(OpenAIServer(scripts=scripts), tmp_path)
    assert "1 of 4 requests got another number of tokens than they asked for" in capsys.readouterr().err
    assert meta_of(tmp_path)["client"]["of_other_length"] == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"error": {"message": "a\\n  b"}}', "a b"),
        (b'{"error": {"code": 3}}', '{"error": {"code": 3}}'),
        (b"<h1>Bad\nGateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"[1]", "[1]"),
        (b"", "nothing"),
        (b"\xff" * 400, "�" * 300 + "…"),
    ],
)
def test_the_message_in_an_answer(answer: bytes, message: str) -> None:
    assert message_of(answer) == message


# -- the server's own counts and warm-up -----------------------------------------------------------------------------


METRICS = """# TYPE fastserve_preemptions_total counter
fastserve_preemptions_total {0}
# TYPE fastserve_swap_out_bytes_total counter
fastserve_swap_out_bytes_total {1}
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{engine="0"}} {0}
"""


def test_what_the_server_counted_meanwhile(tmp_path: Path) -> None:
    server = OpenAIServer(metrics=[METRICS.format("2", "1e3"), METRICS.format("5", "5e9")])
    summary, _ = replayed(server, tmp_path / "ours")
    assert (summary["preemptions"], summary["swap_out_bytes"]) == (6, 5_000_000_000 - 1000)
    assert (summary["swap_in_bytes"], summary["recomputed_tokens"], summary["iterations"]) == (None, None, None)
    for name, metrics in {"none": [], "one": [METRICS], "other": ["<html>", "<html>"]}.items():
        summary, _ = replayed(OpenAIServer(metrics=metrics), tmp_path / name)
        assert (summary["finished"], summary["preemptions"]) == (4, None)


def test_warm_up_is_served_first_and_counts_nowhere(tmp_path: Path) -> None:
    async def script(call: Call) -> web.StreamResponse:
        assert {other.name for other in call.server.calls} >= {"warmup-0", "warmup-1", "warmup-2"}
        return await complete(call)

    server = OpenAIServer(script, {f"warmup-{i}": complete for i in range(3)})
    summary, rows = replayed(server, tmp_path, warmup=3)
    assert (summary["finished"], len(rows), len(server.calls)) == (4, 4, 7)
    assert {call.name for call in server.calls[:3]} == {"warmup-0", "warmup-1", "warmup-2"}


def test_a_warm_up_that_fails_ends_the_run(tmp_path: Path) -> None:
    server = OpenAIServer(scripts={"warmup-1": refuse(400, {"message": "never"})})
    with pytest.raises(ServerError, match="request warmup-1 of the warm-up was rejected: HTTP 400: never"):
        replayed(server, tmp_path, warmup=2)
    assert list(tmp_path.iterdir()) == []


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "given", "recorded"),
    [
        ({"policy": "srpt", "owned_by": "fastserve"}, "", "srpt"),
        ({"policy": "srpt"}, "srpt", "srpt"),
        ({"owned_by": "vllm"}, "", "vllm"),
        ({"owned_by": "vllm"}, "vllm-tuned", "vllm-tuned"),
        ({}, "", "unknown"),
    ],
)
def test_the_policy_is_what_the_server_says(tmp_path: Path, card: dict, given: str, recorded: str) -> None:
    summary, _ = replayed(OpenAIServer(models={"data": [{"id": "tiny", **card}]}), tmp_path, policy=given)
    assert summary["policy"] == meta_of(tmp_path)["configuration"]["policy"] == recorded


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "change", "error", "message"),
    [
        ({"models": {"data": [{"id": "a", "policy": "srpt"}]}}, {"policy": "mlfq"}, ConfigError, "runs policy 'srpt'"),
        ({"models": {"data": [{"id": "a"}, {"id": "b"}]}}, {"model": "c"}, ConfigError, "no model 'c'; it serves a, b"),
        ({"models": {"data": []}}, {}, ServerError, "/v1/models lists no model"),
        ({"models": {"data": None}}, {}, ServerError, "/v1/models lists no model"),
        ({"models": ["tiny"]}, {}, ServerError, 'lists no model: ["tiny"]'),
        ({"models": {"error": "who?"}, "models_status": 401}, {}, ServerError, "answered 401: who?; --url must"),
        ({"models": {}, "models_status": 401}, {}, ServerError, "OPENAI_API_KEY holds the key"),
    ],
)
def test_a_server_that_is_not_what_was_meant_is_named_before_anything_is_written(
    tmp_path: Path, server: dict, change: dict, error: type[FastServeError], message: str
) -> None:
    with pytest.raises(error) as caught:
        replayed(OpenAIServer(**server), tmp_path / "out", **change)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServerError, match=rf"no answer from http://127\.0\.0\.1:{port}/v1/models: .*start the server"):
        run(config(f"http://me:sesame@127.0.0.1:{port}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": None}, "--backend http needs --url"),
        ({"url": "127.0.0.1:8000"}, "--url must be the address of a server"),
        ({"url": "http://127.0.0.1:port"}, "--url must be the address of a server"),
        ({"url": "http://127.0.0.1:8000/?key=x"}, "--url must be the address of a server"),
        ({"settings": {"max_batch_size": 8}}, "--set applies to --backend sim or engine only"),
        ({"profile": "a100-80g/opt-13b-tp1"}, "--profile applies to --backend sim or engine only"),
        ({"device": "cuda"}, "--device applies to --backend engine only"),
        ({"prompts": "words"}, "--prompts must be ids or text, not 'words'"),
        ({"prompts": "text"}, "--prompts text needs --tokenizer"),
        ({"prompts": "text", "tokenizer": "/nowhere"}, "tokenizer '/nowhere' is not a directory"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"max_concurrency": 0}, "max_concurrency must be an integer of at least 1"),
        ({"warmup": -1}, "warmup must be an integer of at least 0"),
        ({"drain_limit_s": -1.0}, "drain_limit must be a finite number of seconds of at least 0, not -1.0"),
        ({"rate": None}, "rate"),
    ],
)
def test_bad_input_is_named_before_a_server_is_asked(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(replace(config("http://127.0.0.1:1"), **change), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_timeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --timeline"):
        run(config("http://127.0.0.1:1"), tmp_path / "out", timeline=tmp_path / "timeline.json")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    with OpenAIServer().running() as url:
        invoke(
            "run", "--backend", "http", "--url", url, "--trace", TRACE, "--rate", "100", "--num-requests", "3",
            "--max-concurrency", "2", "--drain-limit", "100", "--warmup", "1", "--out", str(tmp_path),
        )  # fmt: skip
    meta = meta_of(tmp_path)["configuration"]
    assert (meta["max_concurrency"], meta["drain_limit_s"], meta["warmup"]) == (2, 100, 1)


def test_the_capacity_of_a_server(tmp_path: Path) -> None:
    with OpenAIServer().running() as url:
        objective = Objective(1e-9, seeds=(0, 1), low=100.0)  # A bound that every rate breaks.
        result = find_capacity(config(url, rate=None), objective, tmp_path, lambda _: None)
    assert result.rates == [100.0]
    assert "already at the lowest, 100 requests/s" in next(result.describe())
    assert json.loads((tmp_path / "capacity.json").read_text())["configuration"]["policy"] == "someone"


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    asked = threading.Event()

    async def script(call: Call) -> web.StreamResponse:
        asked.set()
        return await never(call)

    server = OpenAIServer(script)
    with server.running() as url:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "harness.cli", "run", "--backend", "http", "--url", url, "--trace", TRACE,
                "--rate", "10", "--num-requests", "1000", "--out", str(tmp_path),
            ],
            env=os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert asked.wait(timeout=60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_only_a_run_over_http_needs_a_client() -> None:
    code = (
        "import sys, harness.cli, harness.experiments; "
        "sys.exit(bool({'aiohttp', 'prometheus_client', 'transformers'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
