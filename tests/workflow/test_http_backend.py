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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from fastserve.core.errors import ConfigError, FastServeError, NothingFinishedError, ServerError
from fastserve.engine import IterationRecord
from harness.analysis.capacity_result import Objective
from harness.analysis.capacity_search import find_capacity
from harness.client import sender as http_sender
from harness.client import server as http_server
from harness.client.replay import DEFAULT_VOCABULARY
from harness.client.request import parse_extra_body
from harness.client.server import message_of
from harness.run.config import RunConfig
from harness.run.results import CLIENT_COLUMNS, REQUEST_COLUMNS
from harness.run.runner import run
from harness.workload.workload import make_workload
from support.openai_server import (
    DONE,
    Call,
    OpenAIServer,
    Script,
    chunk,
    complete,
    delta,
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
        assert row["event_tokens"] is None
        times = [row["arrival_s"], row["sent_s"], *row["token_s"]]
        assert times == sorted(times)
        assert (row["first_token_s"], row["finished_s"]) == (row["token_s"][0], row["token_s"][3])
        unseen = ("first_scheduled_s", "queueing_s", "swapping_s", "execution_s", "preemptions", "swap_out_bytes")
        assert {row[name] for name in (*unseen, "swap_in_bytes", "recomputed_tokens", "cached_tokens")} == {None}
    assert summary["mean_ttft_s"] == pytest.approx(np.mean([r["first_token_s"] - r["arrival_s"] for r in rows]))
    assert summary["mean_max_token_gap_s"] == pytest.approx(np.mean([np.diff(r["token_s"]).max() for r in rows]))
    iterations = pq.read_table(tmp_path / "iterations.parquet")
    assert (iterations.num_rows, tuple(iterations.column_names)) == (0, IterationRecord._fields)
    meta = meta_of(tmp_path)
    assert meta["configuration"]["vocab_size"] == DEFAULT_VOCABULARY
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


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of seven words, the first of them special, so that it has no text in a prompt."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("words")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(7)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


def text_of(request: int) -> str:
    ids = make_workload(TRACE, "poisson", 200.0, request + 1, 0).prompt_token_ids(request, 7)
    return " ".join(f"w{i}" for i in ids if i)


def test_prompts_as_text(tmp_path: Path, words: str) -> None:
    server = OpenAIServer()
    replayed(server, tmp_path, prompts="text", tokenizer=words, num_requests=1, warmup=1)
    assert [call.body["prompt"] for call in server.calls] == [" ".join(16 * ["w1"]), text_of(0)]
    assert rows_of(tmp_path)[0]["prompt_tokens"] == len(server.calls[1].body["prompt"])  # as the server says


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
        is_client = threading.current_thread() is threading.main_thread()
        slept.extend([seconds] if is_client else [])
        await sleep(seconds + 0.05 * is_client)

    monkeypatch.setattr(http_sender.asyncio, "sleep", overslept)
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
    monkeypatch.setattr(http_sender.resource, "getrlimit", lambda _: (101, 102))
    limits = []
    monkeypatch.setattr(http_sender.resource, "setrlimit", lambda _, limit: limits.append(limit))
    server = OpenAIServer()
    replayed(server, tmp_path, rate=1e6, num_requests=10)
    assert limits == [(102, 102)]
    assert server.most_active <= 2
    assert "waited for one of 2 connections, the most that the limit on open files allows" in capsys.readouterr().err


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
    "no text yet": (say(token(""), token(), DONE), 1, 1),
    "usage without choices": (say(token(), token(), chunk(usage={"completion_tokens": 2}), DONE), 2, 2),
    "usage with the last choice": (
        say(token(), token(), chunk(choices=[{"text": "", "finish_reason": "length"}], usage={"completion_tokens": 2})),
        2,
        2,
    ),
    "no choices and no usage": (say(chunk(choices=[], usage=None), token(), token(), usage(5, 2), DONE), 2, 2),
    "no empty line after [DONE]": (say(token(), token(), usage(5, 2), b"data: [DONE]"), 2, 2),
    "one newline after [DONE]": (say(token(), token(), usage(5, 2), b"data: [DONE]\n"), 2, 2),
    "a finish_reason and no [DONE]": (say(token(), chunk(choices=[{"text": "w", "finish_reason": "length"}])), 2, 4),
    "keep-alives": (say(b": OPENROUTER PROCESSING\n\n", chunk(), token(), chunk(type="ping"), token(), DONE), 2, 2),
    "a byte order mark": (say(b"\xef\xbb\xbf" + OF_TWO), 2, 2),
    "data of several lines": (say(token(), b'data: {"choices": [\ndata: {"text": "w"}]}\n\n', DONE), 2, 2),
}


@pytest.mark.parametrize("name", GOOD)
def test_streams_that_can_be_read(tmp_path: Path, name: str) -> None:
    script, num_events, num_tokens = GOOD[name]
    summary, (row,) = replayed(OpenAIServer(script), tmp_path, num_requests=1)
    assert (summary["finished"], row["output_tokens"], len(row["token_s"])) == (1, num_tokens, num_events)
    assert row["event_tokens"] is None
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
    "error kind": (say(token(), b'event: error\ndata: {"message": "full"}\n\n'), "failed", "after 1 tokens: full"),
    "aborted": (say(token(), chunk(choices=[{"finish_reason": "abort"}]), DONE), "failed", "finish_reason 'abort'"),
    "short": (say(token(), usage(5, 1)), "failed", "(text/event-stream) ended before [DONE] and without a finish_reas"),
    "empty": (say(DONE), "failed", "the stream held no token"),
    "no JSON": (say(token(), b"data: oops\n\n", DONE), "failed", "after 1 tokens: oops"),
    "no object": (say(b"data: 3\n\n"), "failed", "after 0 tokens: 3"),
    "no stream": (refuse(200, {"choices": [{"text": "w w"}]}), "failed", "(application/json) ended before [DONE]"),
}


def test_requests_that_fail_are_counted_and_explained_and_stop_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "did not finish" in line]
    assert said.startswith(f"warning: {len(names)} of {num_requests} requests did not finish (")
    assert "; request 0: " in said
    assert said.endswith("requests.parquet every status")
    assert rows[2 * names.index("cut")]["output_tokens"] == 2
    assert rows[0]["first_token_s"] is None


def test_if_nothing_finishes_the_files_are_there_and_the_first_cause_is_said(tmp_path: Path) -> None:
    server = OpenAIServer(refuse(400, {"error": {"message": "no token ids, please"}}))
    with pytest.raises(
        NothingFinishedError, match=r"none of 4 requests finished; request 0: HTTP 400: no token ids, pl"
    ):
        replayed(server, tmp_path)
    assert {row["status"] for row in rows_of(tmp_path)} == {"rejected"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"], summary["mean_jct_s"]) == (0, 4, None)
    assert meta_of(tmp_path)["error"].startswith("none of 4")


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
        with pytest.raises(NothingFinishedError, match=r"request 0: .*Cannot connect"):
            run(config(url), tmp_path)
        thread.join()
    assert {(row["status"], row["sent_s"]) for row in rows_of(tmp_path)} == {("failed", None)}


def test_what_is_unfinished_at_the_drain_limit_is_aborted(tmp_path: Path) -> None:
    server = OpenAIServer(never)
    with server.running() as url:
        with pytest.raises(NothingFinishedError, match=r"unfinished 0\.2 s after the last arrival"):
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


def test_an_answer_with_a_finish_reason_has_ended_though_its_connection_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A usage may follow in the meantime, and nothing that is not part of the answer puts the end off."""
    monkeypatch.setattr(http_sender, "_AFTER_FINISH_S", 1.0)

    async def script(call: Call) -> web.StreamResponse:
        last = chunk(choices=[{"text": " w", "finish_reason": "length"}])
        response = await call.stream(token(), 0.02, last, 0.3, usage(7, 2))
        while True:
            await response.write(b": ping\n\n")
            await asyncio.sleep(0.1)

    summary, (row,) = replayed(OpenAIServer(script), tmp_path, num_requests=1)
    assert (summary["finished"], row["output_tokens"], row["prompt_tokens"]) == (1, 2, 7)
    assert row["finished_s"] == row["token_s"][-1]


def test_other_lengths_than_asked_for_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {"1": say(token(), DONE)}
    replayed(OpenAIServer(scripts=scripts), tmp_path)
    said = "1 of 4 requests got more or fewer tokens than they asked for: the server may not know ignore_eos"
    assert said in capsys.readouterr().err
    assert meta_of(tmp_path)["client"]["of_other_length"] == 1
    replayed(OpenAIServer(scripts=scripts), tmp_path, ignore_eos=False)
    assert "with --no-ignore-eos the model ends its outputs, so their lengths are not the trace's" in " ".join(
        meta_of(tmp_path)["warnings"]
    )


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


# -- servers that differ ---------------------------------------------------------------------------------------------


def test_a_server_that_knows_chats_alone(tmp_path: Path, words: str) -> None:
    """Its first event has a role and no text."""

    async def script(call: Call) -> web.StreamResponse:
        response = await call.stream(delta(role="assistant", content=""), 0.3)
        for i in range(call.body["max_tokens"]):
            await response.write(delta(**{"reasoning_content" if i < 2 else "content": "w "}))
            await asyncio.sleep(0.01)
        await response.write(delta(finish_reason="length") + usage(9, call.body["max_tokens"]) + DONE)
        return response

    server = OpenAIServer(script, endpoint="/v1/chat/completions")
    text = {"prompts": "text", "tokenizer": words, "num_requests": 2}
    with pytest.raises(NothingFinishedError, match="may have no /v1/completions: try --endpoint chat --prompts text"):
        replayed(server, tmp_path, **text)
    summary, rows = replayed(server, tmp_path, endpoint="chat", **text)
    assert {call.name: call.body for call in server.calls} == {
        str(i): {
            "model": "tiny",
            "messages": [{"role": "user", "content": text_of(i)}],
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(2)
    }
    assert [(row["output_tokens"], len(row["token_s"]), row["prompt_tokens"]) for row in rows] == [(4, 4, 9)] * 2
    assert min(row["first_token_s"] - row["sent_s"] for row in rows) > 0.29
    assert 0.0099 < summary["mean_tpot_s"] < 0.3
    assert meta_of(tmp_path)["configuration"]["endpoint"] == "chat"


def test_a_strict_server_names_the_option_that_helps(tmp_path: Path, words: str) -> None:
    async def script(call: Call) -> web.StreamResponse:
        if "ignore_eos" in call.body:
            return await refuse(422, {"detail": "Unexpected fields in the request: {'ignore_eos'}"})(call)
        if "stream_options" in call.body:
            detail = [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]
            return await refuse(422, {"detail": detail})(call)
        if not isinstance(call.body["prompt"], str):
            return await refuse(400, {"detail": "prompt must be a string."})(call)
        return await complete(call)

    def run_with(**changes: Any) -> dict[str, Any]:
        return replayed(OpenAIServer(script), tmp_path, **changes)[0]

    with pytest.raises(NothingFinishedError, match=r"HTTP 422: .*: add --no-ignore-eos"):
        run_with()
    with pytest.raises(NothingFinishedError, match=r"""HTTP 422: .* add --extra-body '{"stream_options": null}'"""):
        run_with(ignore_eos=False)
    with pytest.raises(NothingFinishedError, match=r"HTTP 400: .* needs --prompts text --tokenizer DIR"):
        run_with(ignore_eos=False, extra_body={"stream_options": None})
    text = {"prompts": "text", "tokenizer": words}
    assert run_with(ignore_eos=False, extra_body={"stream_options": None}, **text)["finished"] == 4
    assert run_with(extra_body={"ignore_eos": None, "stream_options": None}, **text)["finished"] == 4


def test_a_body_of_ones_own(tmp_path: Path) -> None:
    server = OpenAIServer()
    extra = {"temperature": None, "top_k": 1, "stream_options": {"continuous_usage_stats": True}}
    replayed(server, tmp_path, extra_body=extra, num_requests=1)
    body = server.calls[0].body
    assert "temperature" not in body
    assert (body["top_k"], body["stream_options"]) == (1, {"include_usage": True, "continuous_usage_stats": True})
    assert meta_of(tmp_path)["configuration"]["extra_body"] == extra


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--extra-body '{' is not JSON: "),
        ("[]", "--extra-body must be a JSON object, such as"),
        ('{"top_p": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "is not JSON: "),
    ],
)
def test_a_body_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_extra_body(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "models", [(404, {}), (501, {}), (500, {}), (200, {"data": []}), (200, {"data": [{"id": "b"}]})]
)
def test_a_named_model_needs_no_list_and_is_asked_for_before_the_clock_starts(
    tmp_path: Path, models: tuple[int, object]
) -> None:
    server = OpenAIServer(models_status=models[0], models=models[1])
    summary, _ = replayed(server, tmp_path, model="a")
    assert (summary["finished"], summary["policy"]) == (4, "unknown")
    assert [call.name for call in server.calls[:1]] == ["warmup-0"]
    assert {call.body["model"] for call in server.calls} == {"a"}
    assert meta_of(tmp_path)["configuration"]["warmup"] == 1


def test_a_server_that_is_not_ready_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_server, "_FIRST_PAUSE_S", 0.01)
    past = "Thu, 01 Jan 1970 00:00:00 GMT"
    headers = ({}, {"Retry-After": "0"}, {"Retry-After": past}, {"Retry-After": "soon"})
    server = OpenAIServer(not_ready=[*((503, each) for each in headers), (429, {})])
    summary, _ = replayed(server, tmp_path)
    assert summary["finished"] == 4
    errors = capsys.readouterr().err
    assert errors.count("/v1/models answered 503 (loading); asked again in 0.01 s") == 3
    assert errors.count("/v1/models answered 503 (loading); asked again in 0.08 s") == 1
    assert errors.count("/v1/models answered 429 (loading); asked again in") == 1


@pytest.mark.parametrize("header", [{"Retry-After": "3600"}, {}])
def test_a_server_that_is_not_ready_in_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: dict[str, str]
) -> None:
    monkeypatch.setattr(http_server, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(http_server, "_PATIENCE_S", 0.2)
    server = OpenAIServer(not_ready=[(503, header)] * 1000)
    with pytest.raises(ServerError, match="/v1/models answered 503: loading; start it again, or wait"):
        replayed(server, tmp_path / "out")
    assert (len(server.headers) == 1) == bool(header), "not asked again where that is of no use"
    assert not (tmp_path / "out").exists()


# -- unknown metrics -------------------------------------------------------------------------------------------------


def of_four(*sizes: int, usage_runs: bool = False, pause: float = 0.02) -> Script:
    """Four tokens in events of these sizes."""
    chunks: list[bytes | float] = []
    for i, size in enumerate(sizes):
        said = {"completion_tokens": sum(sizes[: i + 1])} if usage_runs else None
        chunks += [chunk(choices=[{"text": size * " w"}], usage=said), pause]
    return say(*chunks, usage(5, 4), DONE)


ALL_AT_ONCE = "4 of 4 finished requests got all their text at once: they have no time to first token, time per token"
NOT_SAID = "4 of 4 finished requests have 16 tokens in 8 events, and the server does not say how many each event has"
SAID = "16 tokens came in 8 events: the longest gap is between events"


@pytest.mark.parametrize(
    ("script", "undefined", "warning"),
    [
        (of_four(1, 1, 1, 1), set(), None),
        (of_four(2, 2, usage_runs=True), set(), SAID),
        (of_four(2, 2), {"tpot", "max_token_gap"}, NOT_SAID),
        (of_four(4), {"ttft", "tpot", "max_token_gap"}, ALL_AT_ONCE),
        (of_four(4, usage_runs=True), {"ttft", "tpot", "max_token_gap"}, ALL_AT_ONCE),
        (say(4 * token() + usage(5, 4) + DONE), {"ttft", "tpot", "max_token_gap"}, ALL_AT_ONCE),
        (say(*(4 * [token(), 0.01]), DONE), set(), "the server gave no usage for 4 of 4 finished requests"),
    ],
)
def test_what_cannot_be_told_is_null_and_said(
    tmp_path: Path, script: Script, undefined: set[str], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, rows = replayed(OpenAIServer(script), tmp_path)
    missing = {name for name in ("jct", "normalized_latency", "ttft", "tpot", "max_token_gap")
               if summary[f"mean_{name}_s"] is None}  # fmt: skip
    assert missing == undefined
    assert {row["output_tokens"] for row in rows} == {4}
    warnings = [line for line in meta_of(tmp_path)["warnings"] if "late" not in line]
    assert [line[: len(warning or "")] for line in warnings] == ([] if warning is None else [warning])
    assert all(f"warning: {line}" in capsys.readouterr().err for line in warnings)


def test_a_long_answer_that_is_kept_back_is_seen_though_it_takes_several_reads(tmp_path: Path) -> None:
    event = chunk(id=150 * "x", choices=[{"text": " w"}])
    summary, (row,) = replayed(
        OpenAIServer(say(1000 * event + usage(5, 1000) + DONE)), tmp_path, trace="fixed:prompt=5,output=1000",
        num_requests=1,
    )  # fmt: skip
    assert len(set(row["token_s"])) > 1
    assert (row["first_token_s"], summary["mean_ttft_s"], summary["mean_tpot_s"]) == (None, None, None)
    assert summary["mean_jct_s"] == pytest.approx(row["finished_s"] - row["arrival_s"])


def test_a_time_per_token_that_few_requests_lack_is_that_of_the_others(tmp_path: Path) -> None:
    server = OpenAIServer(of_four(1, 1, 1, 1), {"3": of_four(2, 2), "7": of_four(4)})
    summary, rows = replayed(server, tmp_path, num_requests=40, rate=1000.0)
    per_token = [(row["finished_s"] - row["first_token_s"]) / 3 for row in rows if row["request_id"] not in ("3", "7")]
    assert summary["mean_tpot_s"] == pytest.approx(np.mean(per_token))
    server.scripts = {**server.scripts, "8": of_four(2, 2)}
    assert replayed(server, tmp_path, num_requests=40, rate=1000.0)[0]["mean_tpot_s"] is None


def test_a_capacity_by_what_cannot_be_told_is_an_error_that_says_why(tmp_path: Path) -> None:
    with OpenAIServer(of_four(4)).running() as url:
        objective = Objective(1.0, "mean_tpot_s", seeds=(0,), low=100.0)
        with pytest.raises(ConfigError, match=f"at 100 requests/s mean_tpot_s is unknown.*{ALL_AT_ONCE}"):
            find_capacity(config(url, rate=None), objective, tmp_path, lambda _: None)
    assert not (tmp_path / "capacity.json").exists()


@pytest.mark.parametrize("owner", ["fastserve", "vllm", "someone"])
def test_servers_known_to_count_are_asked_how_many_tokens_each_event_holds(tmp_path: Path, owner: str) -> None:
    server = OpenAIServer(models={"data": [{"id": "tiny", "owned_by": owner}]})
    replayed(server, tmp_path, num_requests=1)
    asked = server.calls[0].body["stream_options"]
    assert asked == {"include_usage": True} | ({} if owner == "someone" else {"continuous_usage_stats": True})


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
        (
            {"models": {"data": [{"id": "a"}, {"id": "b"}]}, "script": refuse(404, {"message": "no model c"})},
            {"model": "c"},
            ServerError,
            "request warmup-0 of the warm-up was rejected: HTTP 404: no model c; the server lists a, b",
        ),
        ({"models": {"data": []}}, {}, ServerError, "/v1/models lists no model"),
        ({"models": {"data": None}}, {}, ServerError, "/v1/models lists no model"),
        ({"models": ["tiny"]}, {}, ServerError, 'lists no model: ["tiny"]'),
        (
            {"models": {}, "models_status": 404},
            {},
            ServerError,
            "answered 404: {}; --url must lead to an OpenAI-compat",
        ),
        ({"models": {}, "models_status": 501}, {}, ServerError, "if it lists no models, name one with --model"),
        ({"models": {}, "models_status": 401}, {"model": "a"}, ServerError, "OPENAI_API_KEY holds the key"),
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
    assert not list(tmp_path.glob("out/*"))


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
        ({"profile": "a100-80g/opt-13b-tp1-swifttransformer"}, "--profile applies to --backend sim or engine only"),
        ({"device": "cuda"}, "--device applies to --backend engine only"),
        ({"prompts": "words"}, "--prompts must be ids or text, not 'words'"),
        ({"prompts": "text"}, "--prompts text needs --tokenizer"),
        ({"endpoint": "chat"}, "--endpoint chat takes no token ids: add --prompts text --tokenizer DIR"),
        ({"endpoint": "chats"}, "--endpoint must be completions or chat, not 'chats'"),
        ({"extra_body": {"stream": False}}, "--extra-body must not hold stream: the trace and --model set"),
        ({"extra_body": {"prompt": "w", "n": 2}}, "--extra-body must not hold prompt, n: "),
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
            "--max-concurrency", "2", "--drain-limit", "100", "--warmup", "1", "--no-ignore-eos",
            "--extra-body", '{"top_k": 1}', "--out", str(tmp_path),
        )  # fmt: skip
    meta = meta_of(tmp_path)["configuration"]
    assert (meta["max_concurrency"], meta["drain_limit_s"], meta["warmup"]) == (2, 100, 1)
    assert (meta["ignore_eos"], meta["extra_body"], meta["endpoint"]) == (False, {"top_k": 1}, "completions")


def test_the_capacity_of_a_server(tmp_path: Path) -> None:
    with OpenAIServer().running() as url:
        objective = Objective(1e-9, seeds=(0, 1), low=100.0)  # A bound that every rate breaks.
        result = find_capacity(config(url, rate=None), objective, tmp_path, lambda _: None)
    assert result.rates == [100.0]
    assert "already at the lowest, 100 requests/s" in next(result.describe())
    assert json.loads((tmp_path / "capacity.json").read_text())["configuration"]["policy"] == "someone"


@contextmanager
def started(url: str, out: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A command with a thousand requests, in a process of its own."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "harness.cli", *(command or ("run", "--rate", "20")), "--backend", "http",
            "--url", url, "--trace", TRACE, "--arrivals", "constant", "--num-requests", "1000", "--out", str(out),
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_measured_until_a_signal_is_kept(tmp_path: Path, signum: signal.Signals) -> None:
    """Requests 0 and 1 are answered and 2 is not; the rest is yet to come."""
    begun = threading.Event()

    async def script(call: Call) -> web.StreamResponse:
        begun.set()
        return await never(call)

    server = OpenAIServer(script, {"0": complete, "1": complete})
    with server.running() as url, started(url, tmp_path) as process:
        assert begun.wait(timeout=60)
        time.sleep(0.3)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert f"2 of 1000 requests had finished, the others are aborted; wrote {tmp_path}" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == 2 * ["finished"] + 998 * ["aborted"]
    assert {row["sent_s"] is None for row in rows[:3]} == {False}
    assert rows[-1]["sent_s"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"]) == (2, 998)
    assert 0 < summary["mean_jct_s"] < 30
    meta = meta_of(tmp_path)
    assert meta["error"] == f"{signum.name} ended the run: 2 of 1000 requests had finished"
    assert meta["failed"][0] == f"request 2: unfinished when {signum.name} ended the run"
    assert {path.name for path in tmp_path.iterdir()} == {
        "requests.parquet", "iterations.parquet", "summary.json", "meta.json",
    }  # fmt: skip
    while server.left.get(timeout=60) != "2":
        pass


def test_ctrl_c_before_anything_has_finished_leaves_nothing(tmp_path: Path) -> None:
    asked = threading.Event()

    async def script(call: Call) -> web.StreamResponse:
        asked.set()
        return await never(call)

    with OpenAIServer(script).running() as url, started(url, tmp_path) as process:
        assert asked.wait(timeout=60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors == "interrupted: none of 1000 requests had finished; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_is_interrupted_writes_nothing_and_names_no_folder_of_its_own(tmp_path: Path) -> None:
    begun = threading.Event()

    async def script(call: Call) -> web.StreamResponse:
        begun.set()
        return await never(call)

    server = OpenAIServer(script, {"0": complete, "1": complete})
    search = ("capacity", "--slo", "1", "--seeds", "0", "--low", "20")
    with server.running() as url, started(url, tmp_path, *search) as process:
        assert begun.wait(timeout=60)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_midway_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(OpenAIServer(scripts={"1": break_off, "3": refuse(500, {"error": "out of memory"})}), tmp_path)
    errors = capsys.readouterr().err
    assert "2 of 4 requests did not finish (2 failed); request 1: after 2 tokens the connection failed" in errors
    assert f"{tmp_path / 'meta.json'} lists up to 20 reasons" in errors


def test_only_a_run_over_http_needs_a_client() -> None:
    code = (
        "import sys, harness.cli, harness.experiments.batches; "
        "sys.exit(bool({'aiohttp', 'prometheus_client', 'transformers'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
