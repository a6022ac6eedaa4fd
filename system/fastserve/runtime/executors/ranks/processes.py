"""LocalProcesses: the ranks that the engine starts on its own machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed import TCPStore

import fastserve
from fastserve.core.errors import RankError
from fastserve.core.processes import Leash


class LocalProcesses:
    """Processes of this machine, one a rank. Empty if torchrun starts the ranks."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._leash: Leash | None = None
        self._store: TCPStore | None = None
        weakref.finalize(self, _kill, self._processes)

    def start(self, world_size: int, port: int, token: str, torch_threads: int | None) -> None:
        """Start all ranks, with the environment that torchrun would give them.

        Args:
            world_size: number of ranks.
            port: where the engine waits for them.
            token: secret with which they say hello.
            torch_threads: that each computes with; None leaves it to torch.
        """
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._leash = Leash()  # A frozen rank does not see its channel close when this process is killed.
        package = str(Path(fastserve.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        for rank in range(world_size):
            environment = {
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "",
                **os.environ,
                "PYTHONPATH": path,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "FASTSERVE_TOKEN": token,
            }
            if torch_threads is not None:
                environment["OMP_NUM_THREADS"] = str(torch_threads)
            command = [sys.executable, "-m", "fastserve.worker", "--engine", f"127.0.0.1:{port}"]
            command += ["--store", f"127.0.0.1:{self._store.port}"]
            # In a session of its own: Ctrl-C is the engine's to handle.
            self._processes[rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
            self._leash.hold(self._processes[rank].pid)

    def require_running(self, connected: Collection[int]) -> None:
        """Raise RankError if a rank that has not connected yet has ended."""
        for rank, process in self._processes.items():
            if rank not in connected and process.poll() is not None:
                raise RankError(f"rank {rank} {_ending(process.returncode)} before it connected; see its output")

    def ending(self, rank: int) -> str:
        """How the rank's process ended, after waiting for up to a second; empty if it was not started here or runs."""
        process = self._processes.get(rank)
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                return _ending(process.wait(1.0))
        return ""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, the processes are stopped (SIGSTOP) and take no CPU time."""
        for process in self._processes.values():
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self._processes.values():
                process.send_signal(signal.SIGCONT)

    def wait(self, deadline: float) -> None:
        """Wait until all processes have ended or the monotonic clock reaches `deadline` (seconds)."""
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill the processes that still run, and release the store."""
        _kill(self._processes)
        if self._leash is not None:
            self._leash.close()
        self._store = None


def _kill(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    for process in processes.values():
        process.kill()
    for process in processes.values():
        process.wait()
    processes.clear()


def _ending(status: int) -> str:
    """How a process with that exit status ended."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
