"""Commands as processes, and what they start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
FASTBENCH, FASTSERVE = ("harness.cli", "fastserve.cli")


def start(module: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command, by its module, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(found: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return when it is so; AssertionError if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def descendants(pid: int) -> list[psutil.Process]:
    """All that a process has started, and what these have."""
    return psutil.Process(pid).children(recursive=True)


def have_ended(processes: Iterable[psutil.Process], timeout_s: float = 10.0) -> bool:
    """Whether all end in time. One that no parent waits for may stay as a zombie."""
    _, alive = psutil.wait_procs(list(processes), timeout=timeout_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
