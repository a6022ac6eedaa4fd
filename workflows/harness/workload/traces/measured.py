"""Runs of real engines on real GPUs, recorded by others: their requests as the trace `measured:NAME`.

A run is a table of its requests and an entry of tables/measured_runs.json. `harness.studies.measured` reads the times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fastserve.core.errors import ConfigError
from harness.workload.traces.formats import FORMATS
from harness.workload.traces.histogram import TABLES, read_table
from harness.workload.traces.lengths import RecordedLengths
from harness.workload.traces.reading import read_lengths

KIND = "measured"
"""The trace's name before the colon."""


@dataclass(frozen=True)
class MeasuredRun:
    """What was run, under which limits, and where the times are published."""

    name: str
    gpu: str
    model: str
    engine: str
    limits: str
    """The engine's options, and its cache."""
    workload: str
    source: str
    """Repository, commit and licence."""

    @property
    def path(self) -> Path:
        """The table of its requests: a row a request, in order of arrival."""
        return Path(str(TABLES / f"measured_{self.name}.csv"))


@cache
def measured_runs() -> Mapping[str, MeasuredRun]:
    """All measured runs, by name."""
    return {name: MeasuredRun(name, **entry) for name, entry in read_table("measured_runs").items()}


def measured_run(name: str) -> MeasuredRun:
    """Return the run of this name. Raises ConfigError if there is none."""
    if name not in measured_runs():
        raise ConfigError(f"trace 'measured:{name}': no such run; measured: {', '.join(measured_runs())}")
    return measured_runs()[name]


def measured_run_of(trace: str) -> MeasuredRun | None:
    """The run whose requests a trace is; None for another kind of trace."""
    kind, _, name = trace.strip().partition(":")
    return measured_run(name) if kind == KIND else None


def open_measured(name: str) -> RecordedLengths:
    """The requests of a measured run, with their arrival times. Raises ConfigError for an unknown name."""
    run = measured_run(name)
    lengths = read_lengths(FORMATS["csv"], str(run.path))
    return replace(lengths, description=f"{run.workload}, as sent to {run.engine} on {run.gpu} ({run.source})")
