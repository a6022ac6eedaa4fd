"""The points of an experiment: what each of them runs, where it is kept, and tables of all of them.

An experiment is a mapping as workflows/schemas/config.schema.yaml describes it, its defaults filled in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastserve.errors import ConfigError
from fastserve.files import written_whole
from fastserve.latency import load_profile
from harness.capacity import first_upward_crossing, is_monotone, largest_fall
from harness.runner import RunConfig, resolve_settings

Experiment = Mapping[str, Any]
FILES = ("summary.json", "meta.json", "requests.parquet", "iterations.parquet")
"""What a point's folder holds: the files `harness.runner.run` writes."""
CAPACITY_COLUMNS = (
    "experiment",
    "series",
    "label",
    "variant",
    "metric",
    "slo",
    "capacity",
    "capacity_min",
    "capacity_max",
    "seeds",
    "seeds_crossing",
    "monotone",
    "largest_fall",
    "paper_system",
    "paper_capacity",
    "relative_difference",
    "paper_monotone",
    "paper_largest_fall",
    "note",
)


def point_folder(series: str, rate: float, seed: int | str) -> str:
    """Where a point is kept, below the folder of its experiment."""
    return f"{series}/rate-{rate:g}/seed-{seed}"


def run_config(experiment: Experiment, series: Mapping[str, Any], point: Mapping[str, Any], seed: int) -> RunConfig:
    """What one point runs. Settings of the series go before those of the experiment."""
    engine = {name: value for name, value in experiment.get("engine", {}).items() if name != "torch_threads"}
    return RunConfig(
        backend=experiment["kind"],
        policy=series["policy"],
        trace=experiment["trace"],
        arrivals=experiment["arrivals"],
        rate=float(point["rate"]),
        num_requests=point["num_requests"],
        seed=seed,
        profile=series.get("profile"),
        settings={**experiment["settings"], **series["settings"]},
        **engine,
    )


def check_experiment(name: str, experiment: Experiment) -> None:
    """Raise ConfigError for what the schema cannot see: names used twice, an unknown policy, profile or setting."""
    names = {
        "series": (series["name"] for series in experiment["series"]),
        "labels": (series["label"] for series in experiment["series"]),
        "rates": (f"{point['rate']:g}" for point in experiment["points"]),
    }
    for what, values in names.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ConfigError(f"experiment {name!r}: {what} must differ, {twice[0]!r} is there twice")
    for series in experiment["series"]:
        try:
            config = run_config(experiment, series, experiment["points"][0], experiment["seeds"][0])
            resolve_settings(config.policy, config.settings)
            if config.profile:
                load_profile(config.profile)
        except ConfigError as error:
            raise ConfigError(f"experiment {name!r}, series {series['name']!r}: {error}") from error


def load_points(name: str, experiment: Experiment, folder: Path) -> pd.DataFrame:
    """One row per point: series in the order of the experiment, then by rate and seed; every key of summary.json."""
    rows = []
    for series in experiment["series"]:
        for point in sorted(experiment["points"], key=lambda point: point["rate"]):
            for seed in sorted(experiment["seeds"]):
                path = folder / point_folder(series["name"], point["rate"], seed) / "summary.json"
                named = {"experiment": name, "series": series["name"], "label": series["label"]}
                measured = {"policy": None, "rate": None, "num_requests": None, "seed": None, **_read_json(path)}
                rows.append(named | measured)
    return pd.DataFrame(rows)


def load_reported(path: Path, paper: Mapping[str, str] | None) -> pd.DataFrame:
    """The points the paper plotted for this experiment, as columns system, rate, value; none where it has none.

    Raises ConfigError if `paper` names points that are not in the file.
    """
    table = pd.read_csv(path, keep_default_na=False)
    if paper is None:
        table = table.iloc[:0]
    else:
        for column, value in paper.items():
            kept = table[table[column] == value]
            if kept.empty:
                valid = ", ".join(sorted(table[column].unique()))
                raise ConfigError(f"{path.name} holds no points with {column} {value!r}; there are: {valid}")
            table = kept
    return table.rename(columns={"request_rate_per_s": "rate"})[["system", "rate", "value"]].sort_values(
        ["system", "rate"], kind="stable", ignore_index=True
    )


@dataclass(frozen=True)
class Curve:
    """A metric over the rate: the mean over seeds, and the smallest and largest of them."""

    rates: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(points: pd.DataFrame, series: str, metric: str) -> Curve:
    """The curve of one series. A rate at which any seed has no value has none."""
    table = points[points["series"] == series].pivot(index="rate", columns="seed", values=metric).astype(float)
    values = table.to_numpy()
    return Curve(table.index.to_numpy(dtype=float), values.mean(axis=1), values.min(axis=1), values.max(axis=1))


def capacity_of(rates: np.ndarray, values: np.ndarray, slo: float) -> tuple[float | None, str]:
    """The rate at which the values first exceed the SLO; else None, and why."""
    if not np.all(np.isfinite(values)):
        return None, "at some rate no request finished"
    rate = first_upward_crossing(rates, values, slo)
    if rate is not None:
        return rate, ""
    return None, "above the SLO at the lowest rate already" if values[0] > slo else "within the SLO at every rate"


def capacity_table(name: str, experiment: Experiment, points: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Per series, the rate at which its metric first exceeds the SLO, beside that of the paper's own points.

    `capacity` is of the mean over seeds, `capacity_min` and `capacity_max` are over the `seeds_crossing` of `seeds`
    that cross by themselves. What was not reached is empty, and `note` says on which side.
    """
    metric, slo = experiment["metric"], experiment["slo"]
    rows = []
    for series in experiment["series"]:
        ours = curve(points, series["name"], metric)
        own = points[points["series"] == series["name"]]
        by_seed = [
            capacity_of(group["rate"].to_numpy(), group[metric].to_numpy(dtype=float), slo)[0]
            for _, group in own.groupby("seed")
        ]
        crossing = [rate for rate in by_seed if rate is not None]
        capacity, note = capacity_of(ours.rates, ours.mean, slo)
        row = {
            "experiment": name,
            "series": series["name"],
            "label": series["label"],
            "variant": series["variant"],
            "metric": metric,
            "slo": slo,
            "capacity": capacity,
            "capacity_min": min(crossing, default=None),
            "capacity_max": max(crossing, default=None),
            "seeds": len(by_seed),
            "seeds_crossing": len(crossing),
            "monotone": is_monotone(ours.mean),
            "largest_fall": largest_fall(ours.mean),
            "paper_system": series["paper_system"],
            "note": note,
        }
        theirs = reported[reported["system"] == series["paper_system"]]
        if len(theirs):
            paper_capacity, _ = capacity_of(theirs["rate"].to_numpy(), theirs["value"].to_numpy(), slo)
            row |= {
                "paper_capacity": paper_capacity,
                "relative_difference": capacity / paper_capacity - 1 if capacity and paper_capacity else None,
                "paper_monotone": is_monotone(theirs["value"]),
                "paper_largest_fall": largest_fall(theirs["value"]),
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(CAPACITY_COLUMNS))


def provenance(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """meta.json of each folder: commit, versions, hardware."""
    return [_read_json(folder / "meta.json") for folder in folders]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write beside the old file, then put it in its place; the same table gives the same bytes."""
    with written_whole(path) as staging:
        table.to_csv(staging, index=False, lineterminator="\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; delete its folder and run the pipeline again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"cannot read {path}: not an object; delete its folder and run the pipeline again")
    return content
