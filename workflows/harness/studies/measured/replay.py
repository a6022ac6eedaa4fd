"""Replay measured runs in the simulator, and put both side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.files import read_json
from harness.experiments.experiment import Experiment
from harness.experiments.points import Point, points_of
from harness.run.runner import run
from harness.studies.measured.errors import errors_of
from harness.studies.measured.occupancy import from_iterations, from_requests
from harness.studies.measured.table import read_requests, with_quantities
from harness.workload.traces.measured import MeasuredRun, measured_run_of

MEASURED, SIMULATED, ITERATIONS = "measured", "simulated", "simulated, iterations"
"""Kinds of rows: what the engine did, what the simulation did, and what only its iterations tell."""
_TIMES = 600
"""At so many times, evenly spaced, batch and cache are told."""
_WHAT_IS_REPLAYED = ("prompt_tokens", "output_tokens", "arrival_s")


@dataclass(frozen=True)
class Replay:
    """Tables of all runs. Their column `run` is the name of the measured run."""

    errors: pd.DataFrame
    """A row for each statistic (`errors_of`)."""
    requests: pd.DataFrame
    """A row for each request and `kind`, measured and simulated."""
    occupancy: pd.DataFrame
    """Batch and tokens of cache over time, for each `kind`; the size of the cache."""
    runs: pd.DataFrame
    """A row for each run: what a measured run has not left (preemptions), and the makespan of both."""


def replays_of(experiment: Experiment) -> Iterator[tuple[Point, MeasuredRun]]:
    """The runs that repeat measured ones: a point for each panel. Raises ConfigError for a panel that names none."""
    for point in points_of(experiment):
        if point.series != experiment.over:
            continue
        measured = measured_run_of(point.config.trace)
        if measured is None or point.config.arrivals != "trace" or point.config.rate is not None:
            raise ConfigError(
                f"panel {point.panel!r}: a figure of measured runs needs trace measured:NAME with arrivals trace and "
                f"no rate, not trace {point.config.trace!r} with arrivals {point.config.arrivals!r}"
            )
        yield point, measured


def replay(experiment: Experiment, folder: Path) -> Replay:
    """Simulate the runs of the experiment, into folders below `folder`, and compare them with what was measured.

    Raises ConfigError for an experiment that does not repeat measured runs, or whose simulation did not serve all of
    their requests.
    """
    parts = [_one(point, measured, folder / point.panel) for point, measured in replays_of(experiment)]
    return Replay(*(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)))


def _one(point: Point, measured: MeasuredRun, folder: Path) -> tuple[pd.DataFrame, ...]:
    summary = run(point.config, folder)
    real = with_quantities(read_requests(measured))
    served = pd.read_parquet(folder / "requests.parquet").rename(columns={"first_scheduled_s": "scheduled_s"})
    _check_same(measured, real, served)
    sim = with_quantities(served.assign(request=real["request"]))
    engine = read_json(folder / "meta.json")["configuration"]["engine"]
    capacity, block = engine["num_gpu_blocks"], engine["block_size"]

    times_s = np.linspace(0.0, max(real["finished_s"].max(), sim["finished_s"].max()), _TIMES)
    iterations = pd.read_parquet(folder / "iterations.parquet")
    occupancy = {
        MEASURED: from_requests(real, times_s),
        SIMULATED: from_requests(sim, times_s),
        ITERATIONS: from_iterations(iterations, times_s, capacity, block),
    }
    place = {"run": measured.name, "gpu": measured.gpu.partition(",")[0]}
    columns = [*real.columns]
    return (
        pd.DataFrame(errors_of(real, sim)).assign(**place),
        pd.concat([table[columns].assign(kind=kind, **place) for kind, table in ((MEASURED, real), (SIMULATED, sim))]),
        pd.concat(
            [table.assign(kind=kind, capacity_tokens=capacity * block, **place) for kind, table in occupancy.items()]
        ),
        pd.DataFrame([_of_run(summary, real, sim)]).assign(**place),
    )


def _of_run(summary: dict[str, Any], real: pd.DataFrame, sim: pd.DataFrame) -> dict[str, Any]:
    return {
        "requests": len(real),
        "measured_makespan_s": float(real["finished_s"].max() - real["arrival_s"].min()),
        "simulated_makespan_s": summary["duration_s"],
        "simulated_iterations": summary["iterations"],
        "simulated_preemptions": summary["preemptions"],
        "simulated_recomputed_tokens": summary["recomputed_tokens"],
    }


def _check_same(measured: MeasuredRun, real: pd.DataFrame, served: pd.DataFrame) -> None:
    """Raise ConfigError unless the simulation served the measured requests, all of them, to their end."""
    if len(served) != len(real):
        raise ConfigError(
            f"run measured:{measured.name} has {len(real)} requests, but the experiment replays {len(served)}; "
            f"set num_requests to {len(real)}"
        )
    if (failed := int((served["status"] != "finished").sum())) > 0:
        raise ConfigError(f"measured:{measured.name}: {failed} of {len(real)} requests did not finish when simulated")
    for column in _WHAT_IS_REPLAYED:
        if not np.allclose(served[column], real[column]):
            raise ConfigError(f"measured:{measured.name}: the simulation served requests with another {column}")
