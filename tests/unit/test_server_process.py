"""A server's process: ready, dead, paused, stopped, with everything it has started. With real small servers."""

import http.client
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from baselines.external.process import ServerProcess, free_port
from fastserve.core.errors import OutputError, ServerError
from support.polling import eventually
from support.processes import wait_until_ended, wait_until_stopped

# Answers /health, after it has started a process in its session and one in a session of its own, and named them.
SERVER = """
import http.server, os, signal, subprocess, sys

port, names, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if ending == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep, start_new_session=own) for own in (False, True)]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        if self.path == "/die":
            os._exit(3)

    def log_message(self, *_):
        pass

with open(names, "w") as file:
    file.write(" ".join(str(child.pid) for child in children))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Started:
    """A server of that kind, ready, and its children."""

    def __init__(self, folder: Path, ending: str = "") -> None:
        script, names = folder / "server.py", folder / "names"
        script.write_text(SERVER)
        port = free_port()
        command = [sys.executable, str(script), str(port), str(names), ending]
        self.server = ServerProcess("the server", command, f"http://127.0.0.1:{port}", folder / "logs" / "server.log")
        self.server.wait_until_ready(60)
        self.leader = psutil.Process(self.server.pid)
        self.children = [psutil.Process(int(pid)) for pid in names.read_text().split()]

    @property
    def all(self) -> list[psutil.Process]:
        return [self.leader, *self.children]

    def get(self, path: str) -> None:
        connection = http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", path)
        connection.getresponse().read()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    found = Started(tmp_path)
    with found.server:
        yield found


def script(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_it_is_waited_for_and_stops_with_all_that_it_started(started: Started) -> None:
    assert all(process.is_running() for process in started.all)
    assert len({os.getsid(process.pid) for process in [*started.all, psutil.Process()]}) == 3
    started.server.stop()
    wait_until_ended(started.all)
    started.server.stop()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    found = Started(tmp_path, ending="deaf")
    with found.server:
        found.server.stop(grace_s=0.2)
    wait_until_ended(found.all)


def test_paused_nobody_of_it_runs_and_then_all_do_again(started: Started) -> None:
    started.server.pause()
    wait_until_stopped(started.all)
    with started.server.running():
        eventually(lambda: psutil.STATUS_STOPPED not in {process.status() for process in started.all})
        started.get("/health")
    wait_until_stopped(started.all)
    started.server.resume()
    started.get("/health")


def test_a_paused_one_stops_in_order(started: Started) -> None:
    started.server.pause()
    started.server.stop()
    wait_until_ended(started.all)


def test_an_early_end_is_told_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    command = script("import sys; print(*range(100), 'no room', sep='\\n', flush=True); sys.exit(7)")
    log = tmp_path / "s.log"
    with (
        ServerProcess("vLLM", command, "http://127.0.0.1:1", log) as server,
        pytest.raises(ServerError, match="vLLM ended by itself, with status 7") as raised,
    ):
        server.wait_until_ready(60)
    text = str(raised.value)
    assert str(log) in text
    assert text.splitlines()[-2:] == ["  99", "  no room"]
    assert "\n  50" not in text


def test_one_that_dies_later_is_noticed_and_its_children_do_not_outlive_it(started: Started) -> None:
    started.server.pause()
    started.server.resume()  # Now it is known whom it has started.
    started.get("/die")
    os.waitid(os.P_PID, started.server.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ServerError, match="status 3"), started.server.running():
        pass
    started.server.stop()
    wait_until_ended(started.all)


def test_one_that_never_answers_is_given_up(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        ServerProcess("the server", script("import time; time.sleep(600)"), url, tmp_path / "s.log") as server,
        pytest.raises(ServerError, match=rf"did not answer GET {url}/health within 0.3 s"),
    ):
        server.wait_until_ready(0.3)


def test_an_error_of_ours_ends_it_too(tmp_path: Path) -> None:
    found = Started(tmp_path)
    with pytest.raises(KeyboardInterrupt), found.server:
        raise KeyboardInterrupt
    wait_until_ended(found.all)


def test_it_does_not_outlive_us(tmp_path: Path) -> None:
    """Nobody says stop: the interpreter ends by an error that nothing catches."""
    code = f"""
        from pathlib import Path
        from baselines.external.process import ServerProcess
        server = ServerProcess("s", {script("import time; time.sleep(600)")!r}, "", Path({str(tmp_path / "log")!r}))
        print(server.pid, flush=True)
        raise ValueError
    """
    ended = subprocess.run(script(code), capture_output=True, text=True, timeout=60, env=os.environ | python_path())
    assert "ValueError" in ended.stderr
    eventually(lambda: not psutil.pid_exists(int(ended.stdout)))


def test_it_does_not_outlive_us_when_we_are_killed(tmp_path: Path) -> None:
    """Standing still and with a child: neither can see that we are gone."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code = f"""
        import sys
        from pathlib import Path
        from baselines.external.process import ServerProcess
        command = {script(child + "; print(flush=True); time.sleep(600)")!r}
        log = Path({str(tmp_path / "log")!r})
        server = ServerProcess("s", command, "", log)
        while not log.read_text():
            pass
        server.pause()
        print(server.pid, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        script(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | python_path()
    ) as parent:
        assert parent.stdout is not None
        leader = psutil.Process(int(parent.stdout.readline()))
        family = [leader, *leader.children()]
        wait_until_stopped(family)
        parent.kill()
    wait_until_ended(family)


def python_path() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": f"{root}/system:{root}/workflows:{root}"}


def test_variables_are_set_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("REMOVED", "1")
    code = "import os; print([os.environ.get(name) for name in ('KEPT', 'REMOVED', 'ADDED')])"
    log = tmp_path / "s.log"
    server = ServerProcess("s", script(code), "http://127.0.0.1:1", log, {"REMOVED": None, "ADDED": "2"})
    with server, pytest.raises(ServerError, match="status 0"):
        server.wait_until_ready(60)
    assert log.read_text() == "['1', None, '2']\n"


def test_what_cannot_be_started_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"vLLM cannot be started: nowhere/vllm: No such file"):
        ServerProcess("vLLM", ["nowhere/vllm"], "", tmp_path / "s.log")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        ServerProcess("vLLM", ["true"], "", tmp_path / "file" / "s.log")


def test_a_free_port_can_be_listened_at() -> None:
    ports = {free_port() for _ in range(5)}
    assert all(1024 <= port < 65536 for port in ports)
