"""Servers for tests: in this process, with an engine that can be held still, or the command itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from fastserve.core.config import EngineOptions
from fastserve.engine import Engine, Job, Observer, Observers
from fastserve.latency import DecodeFit, FittedLatency, HostLink, PrefillFit, Profile
from fastserve.scheduler import Iteration
from fastserve.server.engine.thread import EngineThread
from fastserve.server.model import ServedModel, simulated_model
from fastserve.server.monitoring.metrics import ServerMetrics
from fastserve.server.monitoring.state import RecentRequests
from fastserve.server.options import ServerOptions
from fastserve.server.serve import bound_socket, http_server
from fastserve.server.service import Server

T = TypeVar("T")

LONG_S = 60.0
"""How long a test waits for what must come. No test that passes waits as long."""
DONE = "[DONE]"
PATHS = [Path(__file__).parents[2] / name for name in ("system", "workflows", "")]


def profile(iteration_s: float = 0.0005, *, num_blocks: int = 4096) -> Profile:
    """Iterations of one length, whatever they compute; a block of 16 tokens moves in 0.1 ms."""
    return Profile(
        name="quick",
        model="none",
        hardware="none",
        engine="simulated",
        dtype="float16",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        stage=FittedLatency(PrefillFit(iteration_s, 0.0, 0.0), (DecodeFit(iteration_s, 0.0, 0.0),)),
        kv_capacity_tokens=16 * num_blocks,
        kv_bytes_per_token=1000,
        host_link=HostLink(16e7, 0.0),
        provenance={},
    )


def simulated(
    policy: str = "fastserve",
    policy_options: dict[str, Any] | None = None,
    *,
    iteration_s: float = 0.0005,
    num_blocks: int = 4096,
    num_host_blocks: int = 4096,
    max_batch_size: int = 16,
    max_model_len: int | None = None,
    tokenizer: Any = None,
    change: Callable[[Engine], None] = lambda engine: None,
) -> ServedModel:
    """A model called `quick` whose tokens are 0, 1, 2, …, or words of its tokenizer; `change` changes its engine."""
    options = EngineOptions(max_batch_size=max_batch_size, num_host_blocks=num_host_blocks, max_model_len=max_model_len)
    model = simulated_model(
        ["quick"], profile(iteration_s, num_blocks=num_blocks), policy, policy_options, options, tokenizer
    )
    change(model.engine)
    return model


class Watcher(Observer):
    """Knows what has become of every request, and can hold the engine still when something has happened."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        """All that ever arrived."""
        self.num_tokens: Counter[str] = Counter()
        self.awaited: list[Awaited] = []

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(job.request.status.value for job in self.jobs.values())

    def look(self) -> None:
        """Has what somebody awaits happened?"""
        for awaited in list(self.awaited):
            if awaited.happened():
                self.awaited.remove(awaited)
                awaited.reached.set()
                assert awaited.go_on.wait(LONG_S)

    def on_arrival(self, job: Job) -> None:
        self.jobs[job.request.request_id] = job
        self.look()

    def on_submit(self, iteration: Iteration) -> None:
        self.look()

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        self.num_tokens[job.request.request_id] += 1
        self.look()

    def on_done(self, job: Job) -> None:
        self.look()


@dataclass
class Awaited:
    """Something that is to happen in the engine's thread, which then waits to be told to go on."""

    happened: Callable[[], bool]
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@dataclass
class RunningServer:
    """A server in a thread of this process."""

    server: Server
    watcher: Watcher
    port: int
    loop: asyncio.AbstractEventLoop
    failures: list[Exception] = field(default_factory=list)
    """What ended its engine. The server goes on."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        """To be looked at by `call`."""
        return self.server.engine.model.engine

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LONG_S)

    def call(self, function: Callable[[], T]) -> T:
        """What it returns in the engine's thread."""
        return self.run(self.server.engine.call(function))

    @contextmanager
    def held_when(self, happened: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Wait until this has happened to the engine, which then stands still until left."""
        awaited = Awaited(happened)
        self.watcher.awaited.append(awaited)
        # It may have happened already. Nobody waits for this, which the engine may be held up by.
        asyncio.run_coroutine_threadsafe(self.server.engine.call(self.watcher.look), self.loop)
        try:
            assert awaited.reached.wait(LONG_S), "it has not happened"
            yield
        finally:
            awaited.go_on.set()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until this has happened to the engine."""
        with self.held_when(happened):
            pass

    def until_unfinished(self, count: int) -> None:
        """Wait until the event loop knows of so many unfinished requests."""

        async def wait() -> None:
            while self.server.engine.num_unfinished != count:
                await asyncio.sleep(0.001)

        self.run(asyncio.wait_for(wait(), LONG_S))

    def until_commanded(self) -> None:
        """Wait until something is asked of the engine's thread, which is held."""

        async def wait() -> None:
            while not self.server.engine._commands:
                await asyncio.sleep(0.001)

        self.run(asyncio.wait_for(wait(), LONG_S))

    def check_empty(self) -> None:
        """Nobody is in the engine, and all blocks are free (I2)."""
        engine = self.engine
        self.until(lambda: not engine.has_unfinished and not engine.executor.num_transfers_in_flight)

        def check() -> None:
            engine.kv.check_invariants()
            assert engine.kv.num_free_gpu_blocks == engine.kv.config.num_gpu_blocks
            assert engine.kv.num_free_host_blocks == engine.kv.config.num_host_blocks
            assert engine.scheduler.num_requests == 0

        self.call(check)

    def metric(self, name: str, **labels: str) -> float:
        """Of /metrics, the one value of `fastserve_` + `name` with these labels and maybe more."""
        text = self.get("/metrics").content.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        (value,) = [
            sample.value
            for sample in samples
            if sample.name == f"fastserve_{name}" and labels.items() <= sample.labels.items()
        ]
        return float(value)

    # -- a plain client ------------------------------------------------------------------------------------------

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(
        self, body: object, path: str = "/v1/completions", headers: Mapping[str, str] | None = None
    ) -> Reply:  # fmt: skip
        """`body` as JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, headers={"Content-Type": "application/json", **(headers or {})})

    def ask(
        self, method: str, path: str, content: bytes | Iterator[bytes] = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)) as connection:
            connection.request(method, path, content, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers.items()), response.read())

    def stream(self, path: str = "/v1/completions", **body: Any) -> EventStream:
        """A stream that has begun to be asked for."""
        return EventStream(self.port, path, body | {"stream": True})


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """What is wrong, in OpenAI's format."""
        error: dict[str, Any] = self.json["error"]
        assert list(self.json) == ["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error


class EventStream:
    """The events of a stream, read one by one; None before the answer has begun."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        self._response: HTTPResponse | None = None

    @property
    def response(self) -> HTTPResponse:
        """Its head, once that is there."""
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    def __iter__(self) -> Iterator[Any]:
        """Each event's JSON; DONE at the end. Raises what reading raises if the stream is cut off."""
        while line := self.response.readline():
            name, _, data = line.decode().rstrip("\n").partition(": ")
            assert name == "data"
            assert self.response.readline() == b"\n"
            yield DONE if data == DONE else json.loads(data)

    def tokens(self, count: int) -> list[int]:
        """The next so many."""
        events = iter(self)
        return [token for _ in range(count) for token in token_ids(next(events))]

    def close(self) -> None:
        """Go away, whether there is more or not."""
        self._connection.close()
        if self._response is not None:
            self._response.close()


def token_ids(event: Any) -> list[int]:
    """Of an event with one choice."""
    (choice,) = event["choices"]
    tokens: list[int] = choice["token_ids"]
    return tokens


@contextmanager
def running(
    build: Callable[[], ServedModel], options: ServerOptions | None = None, *, send_buffer: int | None = None
) -> Iterator[RunningServer]:
    """A server in a thread of this process, at a free port, whose engine's failure does not end it.

    `send_buffer`: bytes that the system keeps for a client that does not read.
    """
    watcher, metrics, recent = Watcher(), ServerMetrics(), RecentRequests()
    thread = EngineThread(build, Observers(metrics, recent, watcher))
    server = Server(options or ServerOptions(), thread, metrics, recent)
    http = http_server(server)
    failures: list[Exception] = []
    started: Future[asyncio.AbstractEventLoop] = Future()

    async def serve() -> None:
        thread.attach(failures.append)
        started.set_result(asyncio.get_running_loop())
        await http.serve(sockets=[listener])
        thread.detach()

    with bound_socket("127.0.0.1", 0) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # Each connection's, then.
        listener.listen(2048)
        serving = threading.Thread(target=uvloop.run, args=(serve(),), name="server")
        serving.start()
        try:
            yield RunningServer(server, watcher, listener.getsockname()[1], started.result(), failures)
        finally:
            for awaited in watcher.awaited:
                awaited.go_on.set()
            http.should_exit = True
            started.result().call_soon_threadsafe(thread.abort_all, "the test is over")
            serving.join(LONG_S)
            thread.stop()


class Command:
    """`fastserve serve` in a process of its own, once it says that it serves."""

    def __init__(self, *arguments: str, extra_paths: Sequence[Path] = (), lifetime_s: float = LONG_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastserve.cli", "serve", "--port", "0", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*extra_paths, *PATHS]))},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog = threading.Timer(lifetime_s, self.process.kill)
        self._watchdog.start()
        assert self.process.stderr is not None
        self._said = self.process.stderr
        self.said: list[str] = []
        """Lines on stderr until now."""
        line = self.until_said("serving ")
        self.port = int(line.rpartition(":")[2])

    def until_said(self, beginning: str) -> str:
        """The first line from here on that begins like this."""
        for line in self._said:
            self.said.append(line.rstrip("\n"))
            if line.startswith(beginning):
                return self.said[-1]
        raise AssertionError(f"ended with status {self.process.wait()} and said {self.said}")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """Its exit status, and what else it said."""
        said = [line.rstrip("\n") for line in self._said]
        return self.process.wait(LONG_S), said

    def stream(self, **body: Any) -> EventStream:
        return EventStream(self.port, "/v1/completions", body | {"stream": True, "return_token_ids": True})

    def kill(self) -> None:
        """If it is still there, as it is after a while in any case."""
        self._watchdog.cancel()
        with self.process:
            self.process.kill()


@contextmanager
def command(
    *arguments: str, extra_paths: Sequence[Path] = (), lifetime_s: float = LONG_S
) -> Iterator[Command]:  # fmt: skip
    """`extra_paths`: where else it finds modules; `lifetime_s`: seconds after which it is killed."""
    started = Command(*arguments, extra_paths=extra_paths, lifetime_s=lifetime_s)
    try:
        yield started
    finally:
        started.kill()
