"""When the engine fails, requests in progress and later ones get an error, and the command ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from fastserve.core.errors import RankError, failure_reason
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Engine
from fastserve.scheduler.iteration import IterationResult
from fastserve.server.engine.thread import EngineThread
from fastserve.server.model import ServedModel
from support.servers import (
    DONE,
    LONG_S,
    Awaited,
    RunningServer,
    Watcher,
    command,
    profile,
    running,
    simulated,
    token_ids,
)

GONE = "rank 1 is gone"


class Fault:
    """Breaks an executor when told to."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def lie_in_wait(self, engine: Engine) -> None:
        collect = engine.executor.collect

        def collect_or_fail() -> IterationResult:
            if self.now.is_set():
                raise RankError(GONE)
            return collect()

        engine.executor.collect = collect_or_fail  # type: ignore[method-assign]


def check_failed(server: RunningServer, message: str) -> None:
    """New requests are refused, and /health and the page say why."""
    for body in ({"prompt": [1]}, {"prompt": [1], "stream": True}):
        reply = server.post(body)
        assert reply.status == 503
        assert reply.error["message"] == f"the engine has failed: {message}"
        assert (reply.error["type"], reply.error["code"]) == ("server_error", "failed")
        assert int(reply.headers["retry-after"]) >= 1
    health = server.get("/health")
    assert (health.status, health.json) == (503, {"status": "failed", "reason": f"the engine has failed: {message}"})
    assert int(health.headers["retry-after"]) >= 1
    state = server.get("/page/state").json
    assert (state["status"], state["error"]) == ("failed", f"the engine has failed: {message}")
    assert server.get("/v1/models").status == 200
    assert [failure_reason(error) for error in server.failures] == [message]


def test_an_executor_that_fails() -> None:
    fault = Fault()
    build = partial(simulated, iteration_s=0.001, max_batch_size=2, change=fault.lie_in_wait)
    with running(build) as server, ThreadPoolExecutor() as clients:
        assert server.post({"prompt": [1], "max_tokens": 2}).status == 200
        with server.held_when():
            streams = [server.stream(prompt=[1], max_tokens=50_000, return_token_ids=True) for _ in range(3)]
            several = server.stream(prompt=[[1], [2]], max_tokens=50_000)
            whole = clients.submit(server.post, {"prompt": [1], "max_tokens": 50_000})
            server.until_unfinished(6)
        server.until(lambda: server.watcher.num_tokens.total() > 20)
        fault.now.set()
        for stream in streams:
            *events, last = stream
            assert [token for event in events for token in token_ids(event)] == list(range(len(events)))
            assert last == {"error": {"message": GONE, "type": "server_error", "param": None, "code": None}}
        assert [event for event in several if event == DONE or "error" in event] == [last]
        reply = whole.result()
        assert reply.status == 503
        assert (reply.error["message"], reply.error["code"]) == (GONE, "failed")
        check_failed(server, GONE)
        assert server.metric("requests_total", outcome="failed") == 6
        assert server.metric("requests_total", outcome="finished") == 1
        assert server.server.engine.num_unfinished == 0


def test_a_request_that_arrives_before_the_event_loop_knows_of_the_failure() -> None:
    fault = Fault()
    with running(partial(simulated, change=fault.lie_in_wait)) as server, ThreadPoolExecutor() as clients:
        failing = Awaited(lambda: server.watcher.outcomes["failed"] == 1)
        with server.held_when():
            first = server.stream(prompt=[1], max_tokens=50_000)
            server.until_unfinished(1)
            server.watcher.awaited.append(failing)
            fault.now.set()
        assert failing.reached.wait(LONG_S)
        late = clients.submit(server.post, {"prompt": [1]})
        server.until_unfinished(2)
        failing.go_on.set()
        assert [event["error"]["message"] for event in first] == [GONE]
        assert (late.result().status, late.result().error["message"]) == (503, GONE)
        assert len(server.watcher.jobs) == 1
        check_failed(server, GONE)


def broken_policy(method: str) -> Callable[[], ServedModel]:
    """One request runs at a time, under a policy whose `method` fails."""

    def fail(_: Request | str) -> None:
        raise KeyError("a bug")

    def change(engine: Engine) -> None:
        setattr(engine.scheduler, method, fail)

    return partial(simulated, "fastserve-fcfs", iteration_s=0.001, max_batch_size=1, change=change)


def test_a_policy_that_fails_to_add_a_request() -> None:
    with running(broken_policy("add")) as server:
        with server.held_when():
            streams = [server.stream(prompt=[1]) for _ in range(3)]
            server.until_unfinished(3)
        assert [event["error"]["message"] for stream in streams for event in stream] == ["KeyError: 'a bug'"] * 3
        check_failed(server, "KeyError: 'a bug'")


def test_a_policy_that_fails_to_abort_a_request() -> None:
    with running(broken_policy("abort")) as server:
        first = server.stream(prompt=[1], max_tokens=50_000)
        server.until(lambda: server.watcher.num_tokens.total() > 0)
        waits = server.stream(prompt=[1])
        with server.held_when(lambda: len(server.watcher.jobs) == 2):
            waits.close()
            server.until_unfinished(1)
        *_, last = first
        assert last["error"]["message"] == "KeyError: 'a bug'"
        check_failed(server, "KeyError: 'a bug'")


def test_a_call_into_the_engines_thread_may_be_cancelled_and_may_fail() -> None:
    with running(simulated) as server:
        engine = server.server.engine

        async def give_up() -> None:
            call = asyncio.ensure_future(engine.call(lambda: 1))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        with server.held_when():
            server.run(give_up())
        assert server.call(lambda: 2) == 2
        with pytest.raises(ZeroDivisionError):
            server.call(lambda: 1 // 0)
        assert server.post({"prompt": [1], "max_tokens": 3}).status == 200
        assert server.failures == []


def test_an_event_loop_may_be_closed_before_its_engine() -> None:
    watcher, failures = Watcher(), list[Exception]()
    thread = EngineThread(partial(simulated, iteration_s=0.0001), watcher)
    many_more = Awaited(lambda: watcher.num_tokens.total() > 100)

    async def begin_and_leave() -> None:
        thread.attach(failures.append)
        thread.add("a", [1], SamplingParams(max_tokens=50_000))
        thread.detach()

    async def come_back() -> int:
        thread.attach(failures.append)
        return await thread.call(lambda: 1)

    asyncio.run(begin_and_leave())
    watcher.awaited.append(many_more)
    assert many_more.reached.wait(LONG_S)
    many_more.go_on.set()
    assert asyncio.run(come_back()) == 1
    thread.stop()
    assert failures == []


def test_an_error_while_the_model_is_built_is_raised() -> None:
    def build() -> Any:
        raise RankError(GONE)

    before = threading.active_count()
    with pytest.raises(RankError, match=GONE), running(build):
        pass
    assert threading.active_count() == before


# -- the command -----------------------------------------------------------------------------------------------------

POLICY = """
from fastserve.policies.fcfs import FCFS

class Broken(FCFS):
    name = "broken"

    def prepare(self, now):
        if any(request.num_output_tokens > 5 for request in self.running.values()):
            raise ValueError("six tokens are too many")
        super().prepare(now)
"""


def test_the_command_ends_with_its_engine(tmp_path: Path) -> None:
    profile().save(tmp_path / "quick.json")
    (tmp_path / "broken_policy.py").write_text(POLICY)
    arguments = ["--backend", "sim", "--profile", str(tmp_path / "quick.json"), "--policy", "broken_policy:Broken"]
    with command(*arguments, extra_paths=[tmp_path]) as server:
        *events, last = server.stream(prompt=[1], max_tokens=50)
        assert len(events) == 6
        assert "policy 'broken_policy:Broken' failed: ValueError: six tokens are too many" in last["error"]["message"]
        # For two seconds it says so on new connections.
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
            connection.request("GET", "/health")
            health = connection.getresponse()
            assert health.status == 503
            reason = f"the engine has failed: {last['error']['message']}"
            assert json.load(health) == {"status": "failed", "reason": reason}
        status, said = server.end()
    assert status == 2
    assert said[-1] == f"error: the engine has failed: {last['error']['message']}"
    assert "broken_policy.py" in said[0]
    assert any("six tokens are too many" in line for line in said[1:-1])


def test_the_command_ends_with_a_rank_that_is_killed() -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("torch")
    arguments = ["--model", "opt-tiny", "--load-format", "dummy", "--policy", "fastserve-fcfs"]
    sizes = ["--set", "num_gpu_blocks=200", "--set", "num_host_blocks=0", "--set", "max_batch_size=2"]
    with command(*arguments, *sizes, "--tensor-parallel-size", "2") as server:
        ranks = psutil.Process(server.process.pid).children(recursive=True)
        workers = [rank for rank in ranks if "fastserve.worker" in " ".join(rank.cmdline())]
        assert len(workers) == 2
        stream = server.stream(prompt=[1, 2, 3], max_tokens=2000, ignore_eos=True)
        stream.tokens(3)
        os.kill(workers[1].pid, signal.SIGKILL)
        *_, last = stream
        assert "was killed by SIGKILL" in last["error"]["message"]
        status, (said,) = server.end()
        assert status == 2
        assert said == f"error: the engine has failed: {last['error']['message']}"
        psutil.wait_procs(workers, timeout=LONG_S)
        assert not any(worker.is_running() for worker in workers)
