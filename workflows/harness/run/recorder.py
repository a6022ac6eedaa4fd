"""RunRecorder: what a run measures, written to its tables as it happens and summarized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from fastserve.engine import IterationLog, Job, RequestMetrics
from harness.run.outcome import Tally
from harness.run.results import REQUEST_COLUMNS, iteration_table, request_table
from harness.run.summary import COUNTED, Summary

if TYPE_CHECKING:
    from harness.client.answer import Exchange

CHUNK = 8192
"""Requests that are written at a time, at least."""


class TableSink(Protocol):
    """Where the rows of tables go."""

    def append(self, name: str, rows: pa.Table) -> None:
        """Append rows to the table of that name. Raises OutputError if they cannot be written."""


class RunRecorder:
    """Writes the rows of requests and iterations as they come, and keeps what the summary needs.

    The rows of requests are in order of arrival, so a finished request is held until all before it are done. At a load
    that the system can carry, at most a few times CHUNK are held.
    """

    def __init__(self, sink: TableSink, columns: Mapping[str, pa.DataType] = REQUEST_COLUMNS) -> None:
        self.tally = Tally()
        self.num_iterations = 0
        self._sink = sink
        self._columns = columns
        self._jobs: list[Job] = []
        """Jobs whose rows are not written yet, in order of arrival."""
        self._next_write = CHUNK
        """How many arrivals must be held before the next attempt to write some; iterations make attempts too."""
        self._summary = Summary()
        self._counts = dict.fromkeys(COUNTED, 0)
        self._writes_begun = self._writes_ended = 0

    @property
    def is_whole(self) -> bool:
        """Whether no write was interrupted. Else the tables may lack rows, or hold some twice."""
        return self._writes_begun == self._writes_ended

    @property
    def num_held(self) -> int:
        """Number of requests whose rows are not written yet."""
        return len(self._jobs)

    def add_job(self, job: Job) -> None:
        """Take the job of a request, in order of arrival. Raises OutputError."""
        self._jobs.append(job)
        if len(self._jobs) >= self._next_write:
            self._write_done()

    def add_iterations(self, iterations: IterationLog) -> None:
        """Write the rows of the next iterations. Raises OutputError."""
        if len(iterations):
            with self._writing():
                self._sink.append("iterations", iteration_table(iterations))
                self.num_iterations += len(iterations)
        if len(self._jobs) >= CHUNK:
            self._write_done()

    def add_rows(self, rows: Sequence[RequestMetrics | Exchange]) -> None:
        """Write the rows of the next requests, in order of arrival. Raises OutputError."""
        if rows:
            with self._writing():
                self._sink.append("requests", request_table(rows, self._columns))
                self._summary.add(rows)
                self.tally.add(rows)

    def finish(self) -> None:
        """Write what is left; a table without rows gets its columns. Call it once, when no job changes any more."""
        self._write(len(self._jobs))
        if not self.tally.num_requests:
            self._sink.append("requests", request_table([], self._columns))
        if not self.num_iterations:
            self._sink.append("iterations", iteration_table(IterationLog()))

    def summary(self, counted: Mapping[str, int | None] | None = None) -> dict[str, Any]:
        """Make the measured part of summary.json. `counted` replaces the counts of rows that do not have them."""
        return self._summary.result(counted or {"iterations": self.num_iterations, **self._counts})

    def _write_done(self) -> None:
        """Write the rows up to the first request that is not done, if they are CHUNK at least."""
        count = next((i for i, job in enumerate(self._jobs) if not job.is_done), len(self._jobs))
        if count >= CHUNK:
            self._write(count)
        self._next_write = len(self._jobs) + CHUNK

    def _write(self, count: int) -> None:
        rows = [job.metrics for job in self._jobs[:count]]
        with self._writing():
            self.add_rows(rows)
            for name, column in COUNTED.items():
                self._counts[name] += sum(getattr(row, column) for row in rows)
            del self._jobs[:count]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._writes_begun += 1
        yield
        self._writes_ended += 1
