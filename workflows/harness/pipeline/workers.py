"""The worker processes of the pipeline: one a core. They take runs, and scripts of cheap steps, from one queue.

Snakemake's jobs are threads of its own process that wait for a worker. So a job costs no start of a process, each
worker imports what it needs once, and the runs of a batch are shared out among all workers.
"""

from __future__ import annotations

import atexit
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from fastserve.core.console import Progress, describe
from fastserve.core.processes import worker_pool
from harness.run.config import RunConfig


class JobFailed(Exception):
    """A job of the pipeline failed; the message says why, or where that was said."""


@dataclass(frozen=True)
class Job:
    """What a script knows of its job, by the names of Snakemake's own object."""

    input: Any
    output: Any
    params: Any
    wildcards: Any
    log: Any


class Workers:
    """Worker processes that start with the first job and end with this process."""

    def __init__(self, count: Callable[[], int], scripts: Path) -> None:
        self._count, self._scripts = count, scripts
        self._stack = ExitStack()
        self._pool: ProcessPoolExecutor | None = None
        self._lock = Lock()
        self._progress: Progress | None = None
        atexit.register(self.close)  # Of a job's own Snakemake, which calls no hooks.

    def show_progress(self, steps: int) -> None:
        """Count runs and scripts on stderr from now on, up to `steps`."""
        if steps:
            self._progress = self._stack.enter_context(Progress("runs, tables and figures", steps))

    def close(self) -> None:
        """End the workers and the progress."""
        self._stack.close()

    def script(self, name: str, job: Job) -> None:
        """Run one of the scripts in a worker. Raises JobFailed; the script has told why on stderr and in its log."""
        try:
            status = self._submit(_run_script, self._scripts / name, job).result()
        except BrokenProcessPool as error:
            raise JobFailed(f"error: {_described(error)}") from None
        if status:
            raise JobFailed(f"{name} ended with status {status}; its log is {job.log[0]}")

    def runs(self, configs: Sequence[Mapping[str, Any]], out: Path, log: Path) -> None:
        """Carry out the runs of a batch and write its files (`write_batch`). Raises JobFailed for the first error.

        The other runs are still waited for, so that none disturbs what follows.
        """
        from harness.pipeline.batch import write_batch  # Here, since it imports pyarrow, and a dry run needs none.

        futures = [self._submit(_run, RunConfig(**config)) for config in configs]
        errors = []
        with log.open("w", encoding="utf-8") as file:
            for future in as_completed(futures):
                if error := future.exception():
                    errors.append(error)
                    print(f"error: {_described(error)}", file=file, flush=True)
                else:
                    print(future.result().line, file=file, flush=True)
        if errors:
            raise JobFailed(f"error: {_described(errors[0])}; the log of the batch is {log}")
        results = [future.result() for future in futures]
        for result in results:
            print(result.said, end="", file=sys.stderr)
        write_batch(results, out)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with self._lock:
            try:
                future = self._workers().submit(function, *arguments)
            except BrokenProcessPool:  # A worker was killed, which fails the jobs of its time and no later ones.
                self._pool = None
                future = self._workers().submit(function, *arguments)
        if self._progress:
            future.add_done_callback(self._progress.advance)
        return future

    def _workers(self) -> ProcessPoolExecutor:
        """The pool, which is started if there is none."""
        if self._pool is None:
            pool = worker_pool(self._count(), partial(_prepare, str(self._scripts)))
            self._pool = self._stack.enter_context(pool)
        return self._pool


def _described(error: BaseException) -> str:
    """One line for a fault of the input or the machine; the traceback of a bug."""
    if isinstance(error, BrokenProcessPool):
        return (
            "a worker process ended: the pipeline was interrupted, or memory ran out (CORES=1 takes less); run the "
            "pipeline again: it keeps the batches that finished"
        )
    if isinstance(error, Exception) and (reason := describe(error)):
        return reason
    return "".join(traceback.format_exception(error))


def _prepare(scripts: str) -> None:
    """Prepare a worker: scripts import modules that lie beside them."""
    sys.path.append(scripts)


def _run(config: RunConfig) -> Any:
    from harness.pipeline.batch import carry_out  # Here, since a worker that only draws needs no engine.

    return carry_out(config)


def _run_script(path: Path, job: Job) -> int:
    """Run a script as Snakemake's `script:` does, but in this process; return its exit status."""
    import runpy

    try:
        runpy.run_path(str(path), {"snakemake": job})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0
