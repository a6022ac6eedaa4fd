"""What every HTTP request gets: an id that its response and the engine share, a count, a line in the access log."""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from fastserve.server.http.log import logger
from fastserve.server.options import ServerOptions
from support.polling import eventually, eventually_equal
from support.servers import LONG_S, RunningServer, command, profile, running, simulated

TEXT = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/", 200), ("/metrics", 200), ("/v1/models/none", 404), ("/nowhere", 404), (TEXT, 405)],
)
def test_every_response_has_the_clients_request_id(quick: RunningServer, path: str, status: int) -> None:
    reply = quick.get(path, {"X-Request-Id": "trace/1:a.b_c=@+-"})
    assert (reply.status, reply.headers["x-request-id"]) == (status, "trace/1:a.b_c=@+-")


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "<b>", "a\tb", "\xe9"])
def test_a_missing_or_invalid_id_is_replaced(quick: RunningServer, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    ids = {quick.get("/health", headers).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in ids)


def test_the_answer_the_engine_and_the_page_show_the_id() -> None:
    with running(simulated) as server:
        headers = {"X-Request-Id": "order-66", "Content-Type": "application/json"}
        reply = server.ask("POST", TEXT, b'{"prompt": [[1], [2]], "max_tokens": 2}', headers)
        assert reply.json["id"] == "cmpl-order-66"
        ids = list(server.watcher.jobs)
        assert [re.sub(r"\.\d+-", "-", one) for one in ids] == ["cmpl-order-66-0", "cmpl-order-66-1"]
        assert sorted(one["id"] for one in server.get("/page/state").json["recent"]) == sorted(ids)


def test_requests_with_the_same_id_are_kept_apart() -> None:
    with running(partial(simulated, iteration_s=0.001)) as server, ThreadPoolExecutor() as clients:
        headers = {"X-Request-Id": "again", "Content-Type": "application/json"}
        body = b'{"prompt": [1], "max_tokens": 50, "return_token_ids": true}'
        with server.held_when():
            asked = [clients.submit(server.ask, "POST", TEXT, body, headers) for _ in range(4)]
            server.until_unfinished(4)
        for reply in (one.result() for one in asked):
            assert reply.json["id"] == "cmpl-again"
            assert reply.json["choices"][0]["token_ids"] == list(range(50))
        assert len(server.watcher.jobs) == 4
        server.check_empty()


def test_answers_are_counted_by_path_and_status() -> None:
    with running(simulated, ServerOptions(max_requests=3)) as server:
        server.post({"prompt": [1], "max_tokens": 1})
        server.post({"prompt": [1], "max_tokens": -1})
        server.post({"prompt": [1], "model": "gpt"})
        server.get("/v1/models/a")
        server.get("/v1/models/b")
        server.get("/no/such/path")
        server.get("/no/other")
        server.get(TEXT)
        count = partial(server.metric, "http_requests_total", model_name="quick")
        assert count(method="POST", path=TEXT, status="200") == 1
        assert count(method="POST", path=TEXT, status="400") == 1
        assert count(method="POST", path=TEXT, status="404") == 1
        assert count(method="GET", path=TEXT, status="405") == 1
        # The number of paths is bounded, whatever clients ask for.
        assert count(method="GET", path="/v1/models/{name}", status="404") == 2
        assert count(method="GET", path="other", status="404") == 2


def test_a_client_that_disconnects_before_its_answer_is_counted_as_499() -> None:
    with running(partial(simulated, iteration_s=0.001)) as server:
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as whole:
            body = b'{"prompt": [1], "max_tokens": 50000}'
            whole.request("POST", TEXT, body, {"Content-Type": "application/json"})
            server.until(lambda: server.watcher.num_tokens.total() > 3)
            assert server.get("/load").json == {"server_load": 1}
        server.check_empty()
        eventually_equal(lambda: server.get("/load").json, {"server_load": 0})
        eventually_equal(lambda: server.metric("http_requests_total", path=TEXT, status="499"), 1)


def test_the_access_log_is_of_level_info(quick: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger.name):
        quick.get("/health")
    assert caplog.messages == []
    with caplog.at_level(logging.INFO, logger.name):
        quick.get("/v1/models/a%0Ab?key=secret", {"X-Request-Id": "me"})
        (line,) = eventually(lambda: list(caplog.messages))
    assert re.fullmatch(r'127\.0\.0\.1:\d+ "GET /v1/models/a%0Ab" 404 0\.\d{3} s me', line)


def test_the_log_says_why_a_request_is_refused_at_level_debug(
    quick: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger.name):
        quick.post({"prompt": [1], "model": "gpt\n"}, headers={"X-Request-Id": "me"})
    assert caplog.messages[0] == "refused with 404: model 'gpt\\n' is not served here; this server has 'quick' me"


def test_a_bug_is_answered_500_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with running(simulated) as server:

        def fail() -> int:
            raise KeyError("a bug")

        server.server.engine.model.engine.rejection_reason = fail  # type: ignore[method-assign,assignment]
        reply = server.post({"prompt": [1]}, headers={"X-Request-Id": "bad-day"})
        assert reply.status == 500
        assert reply.error["message"].startswith("the server has failed: TypeError: ")
        assert reply.error["type"] == "server_error"
        assert reply.headers["x-request-id"] == "bad-day"
        assert server.metric("http_requests_total", path=TEXT, status="500") == 1
        assert server.get("/health").status == 200
    # The log has the traceback.
    assert any(record.exc_info for record in caplog.records if record.name == "uvicorn.error")


def test_the_timeline_shows_requests_by_the_clients_ids(tmp_path: Path) -> None:
    profile().save(tmp_path / "quick.json")
    path = tmp_path / "made" / "serving.json"
    arguments = ["--backend", "sim", "--profile", str(tmp_path / "quick.json"), "--timeline", str(path)]
    with command(*arguments, "--log-level", "info") as server:
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
            headers = {"Content-Type": "application/json", "X-Request-Id": "find-me"}
            connection.request("POST", TEXT, b'{"prompt": [1], "max_tokens": 3}', headers)
            assert connection.getresponse().status == 200
        server.signal()
        status, said = server.end()
    assert status == 0
    assert said[-1] == f"wrote {path}"
    # The access line, among lines of the HTTP library.
    assert any(
        re.search(r'info: 127\.0\.0\.1:\d+ "POST /v1/completions" 200 \d\.\d{3} s find-me$', line) for line in said
    )
    names = [event.get("args", {}).get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert any(name.startswith("cmpl-find-me.") for name in names)
