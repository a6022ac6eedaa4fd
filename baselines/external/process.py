"""A server as a process of its own: started, waited for, stopped for a while and at last, with all that it starts."""

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
"""What is left when a server has ended is told to end as well, and after so long it is killed."""
_TRIES = 10
_SHOWN_LINES = 20


def free_port() -> int:
    """A TCP port of this machine that nobody listens at. Another process may take it first, if only by chance."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class ServerProcess:
    """A server that a command starts, in a session of its own: Ctrl-C is ours to handle.

    Use it as a context manager. It ends, and whatever it has started, when that is left, by an error too, and at the
    latest when this process exits. If this process is killed, what has not left the server's process group is killed.

    Args:
        name: what errors call it.
        command: program and arguments.
        url: where it answers.
        log: the file for all it writes.
        variables: of its environment, beside ours; None removes one.

    Raises:
        ServerError: there is no such program.
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
        """Of the process that the command became."""
        return self._family.leader.pid

    def wait_until_ready(self, timeout_s: float, path: str = "/health") -> None:
        """Return when GET `path` is answered with success. Raises ServerError if it ends before or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self._answers(path):
            self._wait(_ASK_EVERY_S)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer GET {self.url}{path} within {timeout_s:g} s{self._last_words()}"
                )

    def check(self) -> None:
        """Raise ServerError if it has ended."""
        self._wait(0.0)

    def pause(self) -> None:
        """Stop it and all it has started (SIGSTOP): they take no processor until `resume`."""
        # Whom it has started while the others were being stopped is found by looking again.
        stopped: set[psutil.Process] = set()
        while found := self._family.members() - stopped:
            self._family.send(signal.SIGSTOP, found)
            stopped |= found

    def resume(self) -> None:
        """Have them go on."""
        self._family.send(signal.SIGCONT, self._family.members())

    @property
    def processor_s(self) -> float:
        """Processor time that it has taken since its start, and all it has started that is still there."""
        return self._family.processor_s()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have it run within, and stand still again afterwards. Raises ServerError if it has ended."""
        self.check()
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def stop(self, grace_s: float = 15.0) -> None:
        """End it and all it has started: by SIGTERM, and after `grace_s` by SIGKILL. A second time does nothing."""
        if not self._at_exit.alive:
            return
        try:
            self.resume()  # By this we know as well who they are, should they lose their parent.
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
        """Raise ServerError if it ends within."""
        try:
            status = self._family.leader.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise ServerError(f"{self.name} ended by itself, with status {status}{self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "".join(f"\n  {line}" for line in lines) or "\n  (nothing)"
        return f"; the last lines of {self.log}:{shown}"


class _Family:
    """A process that leads a session, with all that it has started, sessions of their own too."""

    def __init__(self, leader: subprocess.Popen[bytes], leash: Leash) -> None:
        self.leader = leader
        self._leash = leash
        self._known: set[psutil.Process] = set()

    def members(self) -> set[psutil.Process]:
        """Those that live. Of one outside the session whose parent has ended, we know if it was ever among them."""
        found = {process for process in psutil.process_iter() if _session(process) == self.leader.pid} | self._known
        for process in list(found):
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
        self._known = {process for process in found if _lives(process)}
        return set(self._known)

    def send(self, what: signal.Signals, members: set[psutil.Process]) -> None:
        """The same signal to each."""
        for process in members:
            with suppress(psutil.Error):
                process.send_signal(what)

    def processor_s(self) -> float:
        """Of those that live, together."""
        seconds = 0.0
        for process in self.members():
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def kill(self) -> None:
        """End all that are left."""
        for _ in range(_TRIES):  # Whom they have started meanwhile is found by looking again.
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
