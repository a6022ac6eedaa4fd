"""An engine that hangs: /health, /metrics and the page's data say so, and new requests are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from fastserve.engine import Engine
from fastserve.scheduler import Iteration
from fastserve.server.options import ServerOptions
from support.polling import eventually_equal
from support.servers import LONG_S, RunningServer, command, profile, running, simulated


class HangingPolicy:
    """Makes a policy's `schedule` wait from `hangs` until `go_on`."""

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.go_on = threading.Event()

    def change(self, engine: Engine) -> None:
        schedule = engine.scheduler.schedule

        def schedule_or_hang(now: float) -> Iteration:
            if self.hangs.is_set():
                assert self.go_on.wait(LONG_S)
            return schedule(now)

        engine.scheduler.schedule = schedule_or_hang  # type: ignore[method-assign]


@contextmanager
def hanging(stall_timeout_s: float = 0.2) -> Iterator[tuple[RunningServer, HangingPolicy]]:
    policy = HangingPolicy()
    build = partial(simulated, iteration_s=0.001, change=policy.change)
    with (
        running(build, ServerOptions(stall_timeout_s=stall_timeout_s)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("fastserve.server.monitoring.state._PATIENCE_S", 0.1)  # The tests wait for it several times.
        try:
            yield server, policy
        finally:
            policy.go_on.set()


def test_health_and_metrics_answer_while_a_policy_hangs() -> None:
    with hanging() as (server, policy):
        assert server.post({"prompt": [1], "max_tokens": 2}).status == 200
        stream = server.stream(prompt=[1], max_tokens=50_000, return_token_ids=True)
        assert stream.tokens(1) == [0]
        policy.hangs.set()
        eventually_equal(lambda: server.get("/health").status, 503)
        health = server.get("/health")
        assert health.json["status"] == "stalled"
        assert health.json["reason"].startswith("the engine is stalled: no iteration has ended for ")
        assert server.get("/ping").status == 503

        assert server.metric("engine_stalled") == 1
        assert server.metric("engine_standstill_seconds") > 0.2
        assert server.metric("requests_arrived_total") == 2
        state = server.get("/page/state").json
        assert state["status"] == "stalled"
        assert state["error"].startswith("the engine is stalled")

        refused = server.post({"prompt": [1]})
        assert (refused.status, refused.error["code"]) == (503, "stalled")
        assert int(refused.headers["retry-after"]) >= 1

        policy.go_on.set()
        policy.hangs.clear()
        eventually_equal(lambda: server.get("/health").status, 200)
        eventually_equal(lambda: server.metric("engine_stalled"), 0)
        assert stream.tokens(2) == [1, 2]
        stream.close()
        server.check_empty()


def test_a_question_to_a_thread_that_hangs_is_asked_once() -> None:
    with hanging() as (server, policy):
        policy.hangs.set()
        stream = server.stream(prompt=[1], max_tokens=50_000)
        server.until_unfinished(1)
        for _ in range(3):
            assert server.get("/metrics").status == 200
        assert len(server.server.engine._commands) <= 1
        stream.close()


def test_an_engine_without_requests_never_stalls() -> None:
    with hanging(stall_timeout_s=0.05) as (server, _):
        assert server.post({"prompt": [1], "max_tokens": 2}).status == 200
        time.sleep(0.2)
        assert server.get("/health").json == {"status": "ready"}
        assert server.metric("engine_standstill_seconds") == 0


POLICY = """
import time
from fastserve.policies.fcfs import FCFS
from fastserve.server.engine import thread

thread._LAST_ITERATION_S = 0.5  # The test waits no longer for the thread's end.

class Hanging(FCFS):
    name = "hanging"

    def prepare(self, now):
        if any(request.num_output_tokens > 5 for request in self.running.values()):
            time.sleep(1000)
        super().prepare(now)
"""


def test_the_command_ends_although_its_policy_hangs(tmp_path: Path) -> None:
    profile().save(tmp_path / "quick.json")
    (tmp_path / "hanging_policy.py").write_text(POLICY)
    arguments = ["--backend", "sim", "--profile", str(tmp_path / "quick.json"), "--policy", "hanging_policy:Hanging"]
    with command(*arguments, "--drain-timeout", "0.1", extra_paths=[tmp_path]) as server:
        stream = server.stream(prompt=[1], max_tokens=50)
        stream.tokens(6)
        server.signal()
        *_, last = stream
        assert last["error"]["message"] == "the server is stopping and could not wait longer"
        status, said = server.end()
    assert status == 2
    assert any("the engine's thread hangs; the process ends without it" in line for line in said)
    assert said[-1] == "error: 1 requests were cut off; a longer --drain-timeout lets them finish"
