"""One run: a workload served by one policy on one backend, measured and written to files."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastserve.core.files import check_writable
from fastserve.engine import Observer, Timeline
from harness.run.backends import make_backend
from harness.run.config import RunConfig, check_history
from harness.run.inputs import history_of, workload_of
from harness.run.meta import run_meta
from harness.run.outcome import Outcome
from harness.run.results import RunFolder
from harness.workload.workload import Workload

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup
    from fastserve.runtime.worker import Worker


def run(
    config: RunConfig,
    out: Path,
    timeline: Path | None = None,
    observer: Observer | None = None,
    worker: Worker | None = None,
    ranks: RankGroup | None = None,
) -> dict[str, Any]:
    """Carry out the run, write its four files to the folder `out`, and return the summary.

    With `timeline`, a trace of the run is written to that file too; without it, `observer` observes the engine. A real
    engine takes `worker`, or `ranks` if it is of several ranks, instead of making its own: a series of runs then loads
    the model once. They must have the same model, and pools at least as large as the run's. A run over HTTP takes none
    of these, since its engine is elsewhere.

    Raises, before anything is written, a FastServeError for bad input, and KeyboardInterrupt if a simulation is
    interrupted, or if another run is interrupted before a request has finished. Raises, after the files are written,
    RankError if a rank of the engine is lost, KeyboardInterrupt if a run is interrupted later, and NothingFinishedError
    if no request finishes. If some requests do not finish, stderr says how many, with the first reason.
    """
    spans = None if timeline is None else Timeline()
    backend = make_backend(config, spans or observer, worker, ranks)
    check_history(config)
    workload = _workload(config)
    backend.prepare()
    if timeline is not None:
        check_writable(timeline)
    with RunFolder(out) as folder:
        measured = backend.measure(workload, folder)
        tally = measured.tally
        num_requests = tally.num_requests
        if measured.is_interrupted and not tally.num_finished:
            _stop(measured.stopped_by, f"none of {num_requests} requests had finished; nothing was written")
        summary = {**_what_ran(measured.config), **measured.summary}
        outcome = Outcome(tally, out)
        meta = run_meta(dict(measured.resolved), workload, outcome, measured.error or outcome.error)
        note = folder.write(summary, {**meta, **measured.meta})
        _warn(note, *measured.warnings)
    if timeline is not None and spans is not None:
        spans.write(timeline)
    if measured.stopped_by is not None:
        finished = f"{tally.num_finished} of {num_requests} requests had finished"
        _stop(measured.stopped_by, f"{finished}, the others are aborted; wrote {out}")
    if outcome.error is not None:
        raise outcome.error
    _warn(outcome.warning)
    return summary


def read_traces(config: RunConfig) -> None:
    """Read the files of a run's requests and history, so that later runs need not, and warn of unlikely numbers.

    Raises a FastServeError for a trace that is unknown, malformed or too short.
    """
    _workload(config)
    history_of(config)


def _workload(config: RunConfig) -> Workload:
    workload = workload_of(config)
    _warn(*workload.questions)
    return workload


def _what_ran(config: RunConfig) -> dict[str, Any]:
    """The first keys of summary.json."""
    return {name: getattr(config, name) for name in ("policy", "backend", "rate", "num_requests", "seed")}


def _stop(stopped_by: BaseException | signal.Signals | None, note: str) -> NoReturn:
    """Raise the error, or let the signal act as usual, which was deferred. An interruption carries the note."""
    try:
        if isinstance(stopped_by, BaseException):
            raise stopped_by
        if stopped_by is not None:
            signal.raise_signal(stopped_by)
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        error.add_note(note)
        raise


def _warn(*warnings: str) -> None:
    """Print the warnings that are not empty."""
    for warning in filter(None, warnings):
        print(f"warning: {warning}", file=sys.stderr)
