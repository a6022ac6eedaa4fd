"""The interface of backends, and the measurement that each of them returns."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.run.config import RunConfig
from harness.run.outcome import Tally
from harness.run.recorder import TableSink
from harness.workload.workload import Workload


@dataclass(frozen=True)
class Measurement:
    """What a backend measured while it served a workload."""

    config: RunConfig
    """The configuration, completed with what the backend found out."""
    resolved: Mapping[str, Any]
    """The configuration as meta.json shows it."""
    summary: Mapping[str, Any]
    """The measured part of summary.json."""
    tally: Tally
    """What became of the requests."""
    stopped_by: BaseException | signal.Signals | None = None
    """What ended the run early: a lost rank or an interruption, or the signal that the client deferred."""
    error: BaseException | None = None
    """The same as meta.json says it."""
    warnings: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of meta.json."""

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return isinstance(self.stopped_by, KeyboardInterrupt | signal.Signals)


class Backend(Protocol):
    """Serves the workload of one run. Making a backend checks the configuration and does no work."""

    def prepare(self) -> None:
        """Load or ask for what the run needs beside its workload. Raises a FastServeError."""

    def measure(self, workload: Workload, tables: TableSink) -> Measurement:
        """Serve the workload, measure, and write a row a request to `requests` and a row an iteration to `iterations`.

        A simulation that is interrupted raises KeyboardInterrupt. Raises OutputError if the rows cannot be written.
        """
