"""A command that is stopped leaves neither processes nor files, and says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastserve.core.console import Terminated
from fastserve.core.errors import WorkerError
from fastserve.core.processes import Leash, worker_pool
from fastserve.engine import Job, Observer
from harness.run.config import RunConfig
from harness.run.runner import run
from support.polling import eventually, eventually_equal
from support.processes import ENVIRONMENT, FASTBENCH, descendants, start, wait_until_ended

SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
LONG = ["--profile", "a100-80g/opt-13b-tp1-swifttransformer", "--trace", "zipf", "--num-requests", 200_000]


@SIGNALS
def test_a_run_that_is_stopped_leaves_no_file(signum: signal.Signals, tmp_path: Path) -> None:
    process = start(FASTBENCH, "run", *LONG, "--rate", 4, "--out", tmp_path / "out")
    eventually(lambda: any((tmp_path / "out").glob(".writing-*")))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert errors.splitlines()[-1].endswith(": nothing was written")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_workers_of_capacity_end_with_it(signum: signal.Signals, tmp_path: Path) -> None:
    search = ["capacity", "--slo", 1, "--low", 4, "--seeds", "0,1", "--out", tmp_path / "out", *LONG]
    process = start(FASTBENCH, *search)

    def num_busy() -> int:
        return sum(each.cpu_times().user > 1 for each in descendants(process.pid))

    if (os.cpu_count() or 1) > 1:
        eventually(lambda: num_busy() >= 2)
    workers = descendants(process.pid)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    wait_until_ended(workers)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signum
        assert errors.splitlines()[-1].endswith(": nothing was written")
        assert not list((tmp_path / "out").iterdir())


def test_workers_end_when_an_error_leaves_their_context() -> None:
    workers = []

    def work() -> None:
        with worker_pool(2) as pool:
            pids = {pool.submit(os.getpid).result() for _ in range(2)}
            workers.extend(psutil.Process(pid) for pid in pids)
            for _ in range(2):
                pool.submit(signal.pause)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert workers
    wait_until_ended(workers)


def die_in_a_pool() -> None:
    with worker_pool(2) as pool:
        pool.submit(os._exit, 3).result()


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(
        WorkerError, match="a worker process ended by itself, perhaps killed for want of memory; choose"
    ):
        die_in_a_pool()


HOLDS = """
import os, subprocess, sys
from fastserve.core.processes import Leash
leash = Leash()
group = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True)
leash.hold(group.pid)
print(group.pid, flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_leash_kills_a_group_whose_parent_was_killed(stopped: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        eventually_equal(lambda: len(descendants(group)), 2)
        held = [psutil.Process(group), *descendants(parent.pid)]
        if stopped:
            os.killpg(group, signal.SIGSTOP)
        parent.kill()
    wait_until_ended(held)


def test_a_closed_leash_leaves_the_group_alone() -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        leash = Leash()
        leash.hold(process.pid)
        leash.close()
        leash.close()
        assert process.poll() is None
        process.kill()


class _StopAfter(Observer):
    """Interrupts the run when so many requests have ended."""

    def __init__(self, count: int) -> None:
        self._left = count

    def on_done(self, job: Job) -> None:
        self._left -= 1
        if not self._left:
            raise Terminated(signal.SIGTERM)


class _StopAtFirstToken(Observer):
    """Interrupts the run before a request can end."""

    def on_token(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_a_real_engine_that_is_stopped_keeps_what_it_has_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import json

    import pyarrow.parquet as pq

    config = RunConfig(
        backend="engine", model="opt-tiny", load_format="dummy", trace="fixed:prompt=8,output=4", arrivals="constant",
        rate=20.0, num_requests=12, settings={"num_gpu_blocks": 64, "num_host_blocks": 8},
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt) as caught:
        run(config, tmp_path, observer=_StopAfter(3))
    assert caught.value.__notes__ == [f"3 of 12 requests had finished, the others are aborted; wrote {tmp_path}"]
    statuses = pq.read_table(tmp_path / "requests.parquet")["status"].to_pylist()
    assert (len(statuses), statuses.count("finished"), statuses.count("aborted")) == (12, 3, 9)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"]) == (3, 9)
    assert summary["mean_ttft_s"] > 0
    assert json.loads((tmp_path / "meta.json").read_text())["error"] == "SIGTERM"


def test_a_real_engine_that_has_finished_nothing_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = RunConfig(
        backend="engine", model="opt-tiny", load_format="dummy", trace="fixed:prompt=10,output=4", rate=20.0,
        num_requests=3, settings={"num_gpu_blocks": 64, "num_host_blocks": 8},
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, observer=_StopAtFirstToken())
    assert not list(tmp_path.iterdir())


def test_a_simulation_that_is_stopped_writes_nothing(tmp_path: Path) -> None:
    config = RunConfig(profile="a100-80g/opt-13b-tp1-swifttransformer", rate=20.0, num_requests=12)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, observer=_StopAfter(3))
    assert not list(tmp_path.iterdir())
