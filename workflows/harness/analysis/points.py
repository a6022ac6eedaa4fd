"""Tables of an experiment: its points, what load they carry within the SLO, and the paper's points beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from harness.analysis.capacity import capacity_estimate, capacity_of, is_monotone, largest_fall
from harness.experiments.experiments import Experiment, points_of

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
"""Metrics that begin with this are shares that fall as the load rises; their objective is a lower bound."""


def points_table(name: str, experiment: Experiment, results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per point, in the order of the experiment: where it belongs, its run, and what that measured.

    `results` gives by run what a batch wrote of it: `folder` and `metrics`.
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
            "run": result["folder"],
        }
        rows.append(row | {key: value for key, value in result["metrics"].items() if key not in row})
    return pd.DataFrame(rows)


def read_table(path: Path) -> pd.DataFrame:
    """A table of an experiment: its points or its capacities; a panel without a name is an empty text."""
    text = {"panel": str, "series": str, "label": str, "policy": str, "run": str}
    table = pd.read_csv(path, dtype=text)
    return table.assign(panel=table["panel"].fillna("") if "panel" in table else "")


def load_reported(path: Path, experiment: Experiment) -> pd.DataFrame:
    """The points the paper plotted for this experiment, as columns panel, system, quantity, rate, value.

    Raises ConfigError if a panel's `paper` names points that are not in the file.
    """
    table = pd.read_csv(path, keep_default_na=False)
    found = [table.iloc[:0].assign(panel="")]
    for panel in experiment["panels"]:
        if panel["paper"] is None:
            continue
        kept = table
        for column, value in panel["paper"].items():
            valid = ", ".join(sorted(kept[column].unique()))
            kept = kept[kept[column] == value] if not isinstance(value, list) else kept[kept[column].isin(value)]
            if kept.empty:
                raise ConfigError(f"{path.name} holds no points with {column} {value!r}; there are: {valid}")
        found.append(kept.assign(panel=panel["name"]))
    reported = pd.concat(found).rename(columns={"request_rate_per_s": "rate", "metric": "quantity"})
    return reported[["panel", "system", "quantity", "rate", "value"]].sort_values(
        ["panel", "system", "quantity", "rate"], kind="stable", ignore_index=True
    )


def by_seed(points: pd.DataFrame, panel: str, series: str, metric: str) -> pd.DataFrame:
    """The curves of one series in one panel: a row a seed, a column a value of x, in rising order."""
    own = points[(points["panel"] == panel) & (points["series"] == series)]
    return own.pivot(index="seed", columns="x", values=metric).astype(float)


def paired(points: pd.DataFrame, panel: str, of: str, over: str, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`by_seed` of two series: the same seeds, at the values of x that both have; NaN where one lacks a seed.

    Raises ConfigError if the points have no such column.
    """
    if metric not in points:
        raise ConfigError(f"the points have no column {metric!r}; there are: {', '.join(points.columns)}")
    one, other = (by_seed(points, panel, series, metric) for series in (of, over))
    one, other = one.align(other, join="inner", axis=1)
    return one.align(other, join="outer", axis=0)


def capacity_table(name: str, experiment: Experiment, points: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Per panel and series, the load at which the metric first leaves its bound, beside that of the paper's points.

    `capacity` is of the mean over seeds; `low` to `high` is the 95 % bootstrap interval over seeds. What was not
    reached is empty, and `note` says on which side; an open end of an interval is infinite.
    """
    metric, slo = experiment["metric"], experiment["slo"]
    falling = metric.startswith(FALLING)
    rows = []
    for panel in experiment["panels"]:
        for series in experiment["series"]:
            table = by_seed(points, panel["name"], series["name"], metric)
            if table.empty:
                continue
            rates = table.columns.to_numpy(dtype=float)
            estimate = capacity_estimate(rates, table.to_numpy(), slo, falling=falling)
            mean = table.to_numpy().mean(axis=0)
            row: dict[str, Any] = {
                "experiment": name,
                "panel": panel["name"],
                "panel_x": panel["x"],
                "series": series["name"],
                "label": series["label"],
                "policy": series["policy"],
                "variant": series["variant"],
                "metric": metric,
                "slo": slo,
                "capacity": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "seeds": len(table),
                "monotone": is_monotone(-mean if falling else mean),
                "largest_fall": largest_fall(-mean if falling else mean),
                "paper_system": series["paper_system"],
                "note": estimate.note,
            }
            theirs = reported[(reported["panel"] == panel["name"]) & (reported["system"] == series["paper_system"])]
            if len(theirs):
                paper_capacity, _ = capacity_of(theirs["rate"], theirs["value"], slo, falling=falling)
                row |= {
                    "paper_capacity": paper_capacity,
                    "relative_difference": (
                        estimate.value / paper_capacity - 1 if estimate.value and paper_capacity else None
                    ),
                    "paper_monotone": is_monotone(theirs["value"]),
                }
            rows.append(row)
    return pd.DataFrame(rows, columns=list(CAPACITY_COLUMNS))


def provenance(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """meta.json of each folder: commit, versions, hardware."""
    return [read_json(folder / "meta.json") for folder in folders]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write beside the old file, then put it in its place; the same table gives the same bytes."""
    with atomic_write(path) as staging:
        table.to_csv(staging, index=False, lineterminator="\n", encoding="utf-8")


def write_json(content: Any, path: Path) -> None:
    """Write `content` as JSON, whole."""
    with atomic_write(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The file's content; ConfigError, with what to do, if it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; delete it and run the pipeline again") from error
