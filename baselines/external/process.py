"""ServerProcess: start, await, pause and stop a server, with all processes that it starts."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import psutil

from fastserve.core.errors import OutputError, ServerError
from fastserve.core.processes import Leash

_ASK_EVERY_S = 0.2
_ANSWER_WITHIN_S = 5.0
_ORPHANS_END_WITHIN_S = 2.0
"""Processes that outlive their server get SIGTERM, and SIGKILL after this time."""
_TRIES = 10
_SHOWN_LINES = 20


def free_port() -> int:
    """A free TCP port of this machine. Another process might still take it first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class ServerProcess:
    """A server started by a command, in its own session, so that Ctrl-C reaches only this process.

    Use it as a context manager: leaving it stops the server and all processes that it has started. They also end when
    this process exits. If this process is killed, the server's process group is killed.

    Args:
        name: of the server, for error messages.
        command: program and arguments.
        url: at which the server answers.
        log: the file for its output.
        variables: added to this process's environment; None removes a variable.

    Raises:
        ServerError: the program does not exist.
        OutputError: the log cannot be written.
    """

    def __init__(
        self, name: str, command: Sequence[str], url: str, log: Path, variables: Mapping[str, str | None] | None = None
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.url = url
        self.log = log
        environment = {**os.environ, **(variables or {})}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("wb")
        except OSError as error:
            raise OutputError(f"cannot write {log}: {error.strerror}") from error
        leash = Leash()
        with output:
            try:
                leader = subprocess.Popen(
                    self.command,
                    env={key: value for key, value in environment.items() if value is not None},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                leash.close()
                raise ServerError(f"{name} cannot be started: {command[0]}: {error.strerror}") from error
        leash.hold(leader.pid)
        self._family = _Family(leader, leash)
        self._at_exit = weakref.finalize(self, self._family.kill)

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._family.leader.pid

    def wait_until_ready(self, timeout_s: float, path: str = "/health") -> None:
        """Wait until GET `path` succeeds. Raises ServerError if the server ends or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self._answers(path):
            self._wait(_ASK_EVERY_S)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer GET {self.url}{path} within {timeout_s:g} s{self._last_lines()}"
                )

    def check(self) -> None:
        """Raise ServerError if the server has ended."""
        self._wait(0.0)

    def pause(self) -> None:
        """Stop the server and all its processes (SIGSTOP): they take no CPU time until `resume`."""
        # Repeat: a process may start another before it is stopped.
        stopped: set[psutil.Process] = set()
        while found := self._family.members() - stopped:
            self._family.send(signal.SIGSTOP, found)
            stopped |= found

    def resume(self) -> None:
        """Let the paused processes continue (SIGCONT)."""
        self._family.send(signal.SIGCONT, self._family.members())

    @property
    def processor_s(self) -> float:
        """CPU seconds of the server and of all its living processes, since their start."""
        return self._family.processor_s()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the server runs; afterwards it is paused again. Raises ServerError if it has ended."""
        self.check()
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def stop(self, grace_s: float = 15.0) -> None:
        """End the server and all its processes: SIGTERM, then SIGKILL after `grace_s`. A second call does nothing."""
        if not self._at_exit.alive:
            return
        try:
            self.resume()  # Also records the processes, should they lose their parent.
            self._family.leader.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._family.leader.wait(grace_s)
                orphans = self._family.members()
                self._family.send(signal.SIGTERM, orphans)
                psutil.wait_procs(orphans, timeout=_ORPHANS_END_WITHIN_S)
        finally:
            self._at_exit()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self, path: str) -> bool:
        address = urlsplit(self.url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=_ANSWER_WITHIN_S)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        return False

    def _wait(self, seconds: float) -> None:
        """Wait; raise ServerError if the server ends meanwhile."""
        try:
            status = self._family.leader.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise ServerError(f"{self.name} ended by itself, with status {status}{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "".join(f"\n  {line}" for line in lines) or "\n  (nothing)"
        return f"; the last lines of {self.log}:{shown}"


class _Family:
    """A session leader and all processes that it has started, in other sessions too."""

    def __init__(self, leader: subprocess.Popen[bytes], leash: Leash) -> None:
        self.leader = leader
        self._leash = leash
        self._known: set[psutil.Process] = set()

    def members(self) -> set[psutil.Process]:
        """The living processes. Remembers those outside the session, which may lose their parent."""
        found = {process for process in psutil.process_iter() if _session(process) == self.leader.pid} | self._known
        for process in list(found):
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
        self._known = {process for process in found if _lives(process)}
        return set(self._known)

    def send(self, what: signal.Signals, members: set[psutil.Process]) -> None:
        """Send the signal to each process."""
        for process in members:
            with suppress(psutil.Error):
                process.send_signal(what)

    def processor_s(self) -> float:
        """CPU seconds of all living processes."""
        seconds = 0.0
        for process in self.members():
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def kill(self) -> None:
        """Kill all processes."""
        for _ in range(_TRIES):  # Repeat: a process may start another before it is killed.
            members = self.members()
            self.send(signal.SIGKILL, members)
            self.leader.wait()
            psutil.wait_procs(members, timeout=_ORPHANS_END_WITHIN_S)
            if not members:
                break
        self._leash.close()


def _session(process: psutil.Process) -> int | None:
    with suppress(OSError):
        return os.getsid(process.pid)
    return None


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
