"""How the command ends: drained, cut off, or not started; with its messages and its exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from fastserve import cli
from fastserve.core.errors import ConfigError
from fastserve.server.engine.thread import EngineThread
from fastserve.server.monitoring.metrics import ServerMetrics
from fastserve.server.monitoring.state import RecentRequests
from fastserve.server.options import ServerOptions
from fastserve.server.serve import bound_socket, run_server
from fastserve.server.service import Server
from support.servers import DONE, LONG_S, Command, command, profile, simulated, token_ids

CUT_OFF = "error: 1 requests were cut off; a longer --drain-timeout lets them finish"
ENDLESS = 50_000


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a simulated server, with iterations of 2 ms."""
    path = tmp_path_factory.mktemp("profile") / "slow.json"
    profile(0.002).save(path)
    return ["--backend", "sim", "--profile", str(path), "--served-model-name", "slow"]


def health(server: Command) -> int:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


def until_arrived(server: Command, count: int) -> None:
    """Wait until `count` requests have arrived."""
    arrived = 0.0
    while arrived < count:
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
            connection.request("GET", "/page/state")
            arrived = json.load(connection.getresponse())["totals"]["requests"]


def ask(server: Command, body: bytes) -> int:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_requests_in_progress_finish_and_new_ones_are_refused(simulation: list[str], number: signal.Signals) -> None:
    with command(*simulation) as server, ThreadPoolExecutor() as clients:
        assert server.said == [f"serving slow by fastserve at http://127.0.0.1:{server.port}"]
        longest = server.stream(prompt=[1], max_tokens=ENDLESS)
        stream = server.stream(prompt=[1], max_tokens=100)
        assert stream.tokens(2) == [0, 1]
        whole = clients.submit(ask, server, b'{"prompt": [1], "max_tokens": 100}')
        until_arrived(server, 3)
        server.signal(number)
        said = server.until_said("SIG")
        assert said in [f"{number.name}: finishing {count} requests, for at most 30 s" for count in range(1, 4)]
        # On new connections, while there are requests in progress.
        for _ in range(3):
            with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
                connection.request("GET", "/health")
                response = connection.getresponse()
                assert response.status == 503
                assert json.load(response) == {"status": "draining", "reason": "the server is stopping"}
                assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert ask(server, b'{"prompt": [1]}') == 503
        *events, last = stream
        assert [token for event in events for token in token_ids(event)] == list(range(2, 100))
        assert last == DONE
        assert whole.result() == 200
        longest.close()
        while True:
            try:
                assert health(server) == 503
            except ConnectionRefusedError:
                break
            except ConnectionResetError:  # It stopped listening just then.
                pass
        assert server.end() == (0, [])


def test_a_request_that_takes_too_long_is_cut_off(simulation: list[str]) -> None:
    with command(*simulation, "--drain-timeout", "0.1") as server:
        stream = server.stream(prompt=[1], max_tokens=ENDLESS)
        assert stream.tokens(2) == [0, 1]
        server.signal()
        *events, last = stream
        assert [token for event in events for token in token_ids(event)] == list(range(2, len(events) + 2))
        assert last["error"]["message"] == "the server is stopping and could not wait longer"
        assert last["error"]["type"] == "server_error"
        assert server.end() == (2, ["SIGTERM: finishing 1 requests, for at most 0.1 s", CUT_OFF])


def test_a_second_signal_cuts_off_at_once(simulation: list[str]) -> None:
    with command(*simulation, "--drain-timeout", "1000") as server, ThreadPoolExecutor() as clients:
        whole = clients.submit(ask, server, f'{{"prompt": [1], "max_tokens": {ENDLESS}}}'.encode())
        stream = server.stream(prompt=[1], max_tokens=ENDLESS)
        assert stream.tokens(2) == [0, 1]
        until_arrived(server, 2)
        server.signal()
        assert server.until_said("SIGTERM") == "SIGTERM: finishing 2 requests, for at most 1000 s"
        server.signal()
        *_, last = stream
        assert last["error"]["message"] == "the server was told to stop at once"
        assert whole.result() == 503
        assert server.end() == (2, [CUT_OFF.replace("1", "2")])


def test_idle_and_incomplete_connections_do_not_delay_the_end(simulation: list[str]) -> None:
    with command(*simulation, "--drain-timeout", "1000") as server, socket.socket() as idle, socket.socket() as half:
        for connection in (idle, half):
            connection.connect(("127.0.0.1", server.port))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert health(server) == 200
        server.signal()
        assert server.end() == (0, ["SIGTERM: finishing 0 requests, for at most 1000 s"])
        assert idle.recv(1) == b""
        assert half.recv(1000).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


# -- what cannot be served -------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error, one line, with which the command exits with status 2."""
    monkeypatch.setattr(sys, "argv", ["fastserve", "serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").rstrip("\n")


SIM = ["--backend", "sim", "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing: a directory in Hugging Face format or a preset"),
        (SIM, "--backend sim needs --profile; `fastbench profiles` lists those shipped"),
        (["--backend", "cloud"], "unknown backend 'cloud'; known: engine, sim"),
        ([*SIM, "--profile", "none"], "no profile 'none': give the path of a .json file"),
        ([*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--policy", "best"], "unknown policy 'best'"),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--device", "cuda"],
            "--device applies to --backend engine only",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--model", "opt-tiny"],
            "--model applies to --backend engine only",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--tokenizer", "./none"],
            "tokenizer './none' is not a directory",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--set", "speed=1"],
            "unknown option 'speed'; valid for policy",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--set", "speed"],
            "--set takes key=value, got 'speed'",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--host", "no.such.host.invalid"],
            "--host no.such.host.invalid is neither an address nor a name that can be resolved",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--host", "192.0.2.1"],
            "--host 192.0.2.1 is not an address of this machine; give one that is",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--log-level", "loud"],
            "log_level must be one of error, warning, info, debug, got 'loud'",
        ),
        (
            [*SIM, "--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--ssl-certfile", "./none.pem"],
            "--ssl-certfile none.pem: No such file",
        ),
        (["--model", "opt-126m", "--port", "0"], "unknown model preset 'opt-126m'"),
        (["--model", "./nowhere", "--port", "0"], "model directory './nowhere' does not exist"),
        (["--model", "opt-tiny", "--port", "0"], "preset 'opt-tiny' has no weights"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in run(monkeypatch, capfd, *arguments)


def test_a_port_in_use_is_reported_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = run(monkeypatch, capfd, "--model", "./nowhere", "--port", str(port))
    assert said == f"port {port} of 127.0.0.1 is in use; choose another --port, 0 for any free one"


def test_a_port_is_taken_while_the_model_is_loaded() -> None:
    metrics = ServerMetrics()
    engine = EngineThread(simulated, metrics)
    with bound_socket("127.0.0.1", 0) as ours:
        port = ours.getsockname()[1]
        with bound_socket("127.0.0.1", port) as theirs:
            theirs.listen()
            server = Server(ServerOptions(), engine, metrics, RecentRequests())
            with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
                asyncio.run(run_server(server, ours))
    engine.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests must be an integer of at least 1, got 0"),
        ({"drain_timeout_s": 0.0}, "drain_timeout_s must be a finite number above 0"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s must be a finite number above 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


def test_a_real_model_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("FASTSERVE_API_KEY", "secret")
    arguments = ["--model", "opt-tiny", "--load-format", "dummy", "--policy", "fastserve-fcfs", "--torch-threads", "1"]
    with command(*arguments, "--no-page", "--set", "num_gpu_blocks=20", "--set", "max_batch_size=2") as server:
        assert server.said == [
            "KV cache: 20 blocks (0.3 MB) on the device and 20 blocks (0.3 MB) in host memory, of 16 tokens each; "
            "sized by the free memory, --set num_host_blocks=N to choose",
            f"serving opt-tiny by fastserve-fcfs at http://127.0.0.1:{server.port}",
        ]
        body = b'{"prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": true}'
        assert ask(server, body) == 401
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)) as connection:
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            connection.request("POST", "/v1/completions", body, headers)
            assert json.load(connection.getresponse())["usage"]["completion_tokens"] == 8
            connection.request("GET", "/")
            assert connection.getresponse().status == 404
        server.signal()
        assert server.end() == (0, ["SIGTERM: finishing 0 requests, for at most 30 s"])
