"""The process of a step: its output goes to a log, and it ends with its time limit or with this process."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from _gpu_steps import ROOT, Outcome, Step

from fastserve.core.processes import Leash
from harness.studies.recorded.recording import MORE_TO_DO

_TO_START_S = 15.0
"""Part of a divisible step's time that is kept for starting Python and for stopping."""
_MOST_OF_A_LOG = 100_000
"""Characters kept of a log's beginning, and of its end."""


def carry_out(step: Step, logs: Path, left_s: float) -> Outcome:
    """Run a step; its output goes to stdout and to its log, NAME.log once it is done, NAME.unfinished.log until then.

    The step and all processes that it started are killed after its limit or after `left_s` seconds, whichever is first.
    """
    arguments, limit_s = list(step.arguments), min(step.limit_s, left_s)
    if step.divisible and math.isfinite(left_s):
        arguments += ["--minutes", f"{(limit_s - _TO_START_S) / 60:.3f}"]
    log, began = logs / f"{step.name}.unfinished.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file, _started(arguments, limit_s) as (process, expired):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            print(f"  {line}", end="", flush=True)
        status = process.wait()
        if expired.is_set():
            file.write(f"killed after {limit_s:.3g} s\n")
    seconds = time.monotonic() - began
    _shorten(log)
    if expired.is_set():
        return Outcome(step.name, "failed", seconds, f"took longer than {limit_s:.3g} s and was killed")
    if status == 0:
        log.replace(logs / f"{step.name}.log")
        return Outcome(step.name, "done", seconds)
    if status == step.nothing_to_do:
        return Outcome(step.name, "skipped", seconds, "there is nothing to do yet")
    if step.divisible and status == MORE_TO_DO:
        return Outcome(step.name, "unfinished", seconds, "the next call resumes it")
    return Outcome(step.name, "failed", seconds, f"status {status}")


@contextlib.contextmanager
def _started(arguments: Sequence[str], limit_s: float) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """Start a process in its own group, which is killed after the limit (this sets the event) or with this process."""
    leash = Leash()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    leash.hold(process.pid)
    expired = threading.Event()

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), expire)
    timer.start()
    try:
        yield process, expired
    finally:
        timer.cancel()
        kill()
        process.wait()
        leash.close()


def _shorten(log: Path) -> None:
    """Cut the middle out of a long log."""
    text = log.read_text(encoding="utf-8")
    if len(text) > 2 * _MOST_OF_A_LOG:
        left_out = len(text) - 2 * _MOST_OF_A_LOG
        text = f"{text[:_MOST_OF_A_LOG]}\n... {left_out} characters left out ...\n{text[-_MOST_OF_A_LOG:]}"
        log.write_text(text, encoding="utf-8")
