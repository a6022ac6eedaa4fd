"""Tables of an experiment: its points, the paper's points, and the capacity of each series within the SLO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.capacity import capacity_estimate, capacity_of, is_monotone, largest_fall
from harness.experiments.experiment import Experiment
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
    "note",
)
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
        rows.append(row | {key: value for key, value in result["metrics"].items() if key not in row})
    return pd.DataFrame(rows)


def load_reported(path: Path, experiment: Experiment) -> pd.DataFrame:
    """Read the points that the paper plots for this experiment: columns panel, system, quantity, rate, value.

    Raises ConfigError if a panel's `paper` names points that the file lacks.
    """
    table = pd.read_csv(path, keep_default_na=False)
    found = [table.iloc[:0].assign(panel="")]
    for panel in experiment.panels:
        if panel.paper is None:
            continue
        kept = table
        for column, value in panel.paper.model_dump(exclude_unset=True).items():
            valid = ", ".join(sorted(kept[column].unique()))
            kept = kept[kept[column] == value] if not isinstance(value, list) else kept[kept[column].isin(value)]
            if kept.empty:
                raise ConfigError(f"{path.name} holds no points with {column} {value!r}; there are: {valid}")
        found.append(kept.assign(panel=panel.name))
    reported = pd.concat(found).rename(columns={"request_rate_per_s": "rate", "metric": "quantity"})
    return reported[["panel", "system", "quantity", "rate", "value"]].sort_values(
        ["panel", "system", "quantity", "rate"], kind="stable", ignore_index=True
    )


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
    """Find, for each panel and series, the load at which the metric first leaves its bound, and the paper's.

    `capacity` is of the mean over seeds; `low` to `high` is its 95 % bootstrap interval over seeds. If the bound is not
    crossed, `capacity` is empty and `note` gives the side. An open end of an interval is infinite.
    """
    metric, slo = experiment.metric, experiment.slo
    assert slo is not None
    falling = metric.startswith(FALLING)
    rows = []
    for panel in experiment.panels:
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
            of_paper = reported[(reported["panel"] == panel.name) & (reported["system"] == series.paper_system)]
            if len(of_paper):
                paper_capacity, _ = capacity_of(of_paper["rate"], of_paper["value"], slo, falling=falling)
                row |= {
                    "paper_capacity": paper_capacity,
                    "relative_difference": (
                        estimate.value / paper_capacity - 1 if estimate.value and paper_capacity else None
                    ),
                    "paper_monotone": is_monotone(of_paper["value"]),
                }
            rows.append(row)
    return pd.DataFrame(rows, columns=list(CAPACITY_COLUMNS))
