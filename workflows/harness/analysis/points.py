"""Tables of an experiment: its points, the paper's points, and the capacity of each series within the SLO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.capacity import capacity_estimate, capacity_of, is_monotone, largest_fall
from harness.experiments.experiment import Experiment, PlottedPoints
from harness.experiments.points import points_of

CAPACITY_COLUMNS = (
    "experiment",
    "panel",
    "panel_x",
    "series",
    "label",
    "policy",
    "variant",
    "metric",
    "slo",
    "capacity",
    "low",
    "high",
    "seeds",
    "monotone",
    "largest_fall",
    "paper_system",
    "paper_capacity",
    "relative_difference",
    "paper_monotone",
    "rerun_capacity",
    "rerun_difference",
    "note",
)
PAPER, RERUN = "paper", "rerun"
"""Sources of points: what the paper shows, and what its authors measured again for their artifact."""
FALLING = "slo_attainment"
"""Metrics whose names begin with this are shares that fall as the load rises; their objective is a lower bound."""


def points_table(name: str, experiment: Experiment, results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Make a row per point, in the order of the experiment: its place, its run, and the run's metrics.

    `results` maps the name of a run to what its batch holds of it, such as `metrics`.
    """
    rows = []
    for point in points_of(experiment):
        result = results[point.run]
        row = {
            "experiment": name,
            "panel": point.panel,
            "series": point.series,
            "label": point.label,
            "policy": point.config.policy,
            "x": point.x,
            "rate": point.config.rate,
            "num_requests": point.config.num_requests,
            "seed": point.config.seed,
            "run": point.run,
        }
        rows.append(row | {key: _cell(value) for key, value in result["metrics"].items() if key not in row})
    return pd.DataFrame(rows)


def _cell(value: Any) -> Any:
    """A metric as a cell: of a mapping its keys."""
    return " ".join(value) if isinstance(value, Mapping) else value


def load_reported(paper: Path, rerun: Path, experiment: Experiment) -> pd.DataFrame:
    """Read the points that FastServe's authors plotted: columns panel, source, system, quantity, rate, value.

    Raises ConfigError if a panel's `paper` or `rerun` names points that the file lacks.
    """
    found = [pd.DataFrame(columns=["panel", "source", "system", "metric", "request_rate_per_s", "value"])]
    for source, path in ((PAPER, paper), (RERUN, rerun)):
        table = pd.read_csv(path, keep_default_na=False)
        for panel in experiment.panels:
            wanted = panel.paper if source == PAPER else panel.rerun
            if wanted is not None:
                found.append(_chosen(table, wanted, path.name).assign(panel=panel.name, source=source))
    reported = pd.concat(found[1:] or found).rename(columns={"request_rate_per_s": "rate", "metric": "quantity"})
    return reported[["panel", "source", "system", "quantity", "rate", "value"]].sort_values(
        ["panel", "source", "system", "quantity", "rate"], kind="stable", ignore_index=True
    )


def _chosen(table: pd.DataFrame, wanted: PlottedPoints, file: str) -> pd.DataFrame:
    """The rows of a table that a panel names. Raises ConfigError if there are none."""
    for column, value in wanted.model_dump(exclude_unset=True).items():
        valid = ", ".join(sorted(table[column].unique()))
        table = table[table[column] == value] if not isinstance(value, list) else table[table[column].isin(value)]
        if table.empty:
            raise ConfigError(f"{file} holds no points with {column} {value!r}; there are: {valid}")
    return table


def by_seed(points: pd.DataFrame, panel: str, series: str, metric: str) -> pd.DataFrame:
    """The curves of one series in one panel [seeds, x], with x rising."""
    own = points[(points["panel"] == panel) & (points["series"] == series)]
    return own.pivot(index="seed", columns="x", values=metric).astype(float)


def paired(points: pd.DataFrame, panel: str, of: str, over: str, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`by_seed` of two series: the same seeds, at the values of x that both have; NaN where a series lacks a seed.

    Raises ConfigError if the points have no such column.
    """
    if metric not in points:
        raise ConfigError(f"the points have no column {metric!r}; there are: {', '.join(points.columns)}")
    one, other = (by_seed(points, panel, series, metric) for series in (of, over))
    one, other = one.align(other, join="inner", axis=1)
    return one.align(other, join="outer", axis=0)


def capacity_table(name: str, experiment: Experiment, points: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Find, for each panel and series, the load at which the metric first leaves its bound, and the authors'.

    `capacity` is of the mean over seeds; `low` to `high` is its 95 % interval over seeds. If the bound is not crossed,
    `capacity` is empty and `note` gives the side. An open end of an interval is infinite.
    """
    metric = experiment.metric
    falling = metric.startswith(FALLING)
    rows = []
    for panel in experiment.panels:
        slo = experiment.slo_of(panel.name)
        assert slo is not None
        for series in experiment.series:
            table = by_seed(points, panel.name, series.name, metric)
            if table.empty:
                continue
            rates = table.columns.to_numpy(dtype=float)
            estimate = capacity_estimate(rates, table.to_numpy(), slo, falling=falling)
            mean = table.to_numpy().mean(axis=0)
            row: dict[str, Any] = {
                "experiment": name,
                "panel": panel.name,
                "panel_x": panel.x,
                "series": series.name,
                "label": series.label,
                "policy": series.policy,
                "variant": series.variant,
                "metric": metric,
                "slo": slo,
                "capacity": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "seeds": len(table),
                "monotone": is_monotone(-mean if falling else mean),
                "largest_fall": largest_fall(-mean if falling else mean),
                "paper_system": series.paper_system,
                "note": estimate.note,
            }
            of_paper, of_rerun = (
                plotted_points(reported, source, panel.name, series.paper_system) for source in (PAPER, RERUN)
            )
            if len(of_paper):
                capacity, difference = _their_capacity(of_paper, estimate.value, slo, falling)
                row |= {
                    "paper_capacity": capacity,
                    "relative_difference": difference,
                    "paper_monotone": is_monotone(of_paper["value"]),
                }
            if len(of_rerun):
                capacity, difference = _their_capacity(of_rerun, estimate.value, slo, falling)
                row |= {"rerun_capacity": capacity, "rerun_difference": difference}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(CAPACITY_COLUMNS))


def plotted_points(reported: pd.DataFrame, source: str, panel: str, system: str | None) -> pd.DataFrame:
    """What the paper, or its authors' rerun, has for a system in a panel; empty if nothing, or for no system."""
    if reported.empty or system is None:
        return reported.iloc[:0]
    return reported[(reported["source"] == source) & (reported["panel"] == panel) & (reported["system"] == system)]


def plotted_load(theirs: pd.DataFrame, slo: float, falling: bool) -> float | None:
    """The load at which a curve of the authors leaves the bound; None without points or crossing."""
    return None if theirs.empty else capacity_of(theirs["rate"], theirs["value"], slo, falling=falling)[0]


def _their_capacity(
    theirs: pd.DataFrame, ours: float | None, slo: float, falling: bool
) -> tuple[float | None, float | None]:
    """The load at which a curve of the authors leaves the bound, and ours over it, less 1; None if unknown."""
    capacity = plotted_load(theirs, slo, falling)
    return capacity, ours / capacity - 1 if ours and capacity else None
