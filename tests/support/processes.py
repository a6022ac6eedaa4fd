"""Commands as processes, and what they start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from support.polling import eventually, eventually_equal

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


def descendants(pid: int) -> list[psutil.Process]:
    """The children of a process, their children, and so on."""
    return psutil.Process(pid).children(recursive=True)


def wait_until_ended(processes: Iterable[psutil.Process]) -> None:
    """Return when every process has ended; AssertionError if one does not.

    A process whose parent never waits for it stays as a zombie, which counts as ended.
    """
    processes = list(processes)
    eventually(lambda: [process for process in processes if _runs(process)], lambda running: not running)


def wait_until_stopped(processes: Iterable[psutil.Process]) -> None:
    """Return when every process stands still.

    SIGSTOP takes effect some time after it is sent: it is pending until the kernel next runs the process.
    """
    processes = list(processes)
    eventually_equal(lambda: {process.status() for process in processes}, {psutil.STATUS_STOPPED})


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
