"""Warnings to the reader, written below the figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.capacity import is_monotone, largest_fall
from harness.analysis.derived import SLO_SCALES
from harness.experiments.experiment import x_key
from harness.report.plots.deciles import DECILES
from harness.report.plots.style import percent
from harness.report.plots.tables import Tables, ordered
from harness.studies.processors import LEAST_SHARE

OTHERS = 0.1
"""Other processes that keep more cores than this busy while servers are measured cause a warning."""
_OVER_LOAD = ("load", "slo", "capacity")
"""Kinds of figures whose metric should only get worse as the load rises."""


def flags_of(experiment: Mapping[str, Any], points: pd.DataFrame, capacity: pd.DataFrame | None) -> list[str]:
    """List the warnings: curves that are not monotone, missing values, failed requests."""
    if experiment["figure"] == "fidelity":
        return list(_crowded(points))
    tables = Tables(experiment, points, capacity)
    flags = [*_not_monotone(tables), *_missing(tables), *_unpaired(tables), *_failed(tables), *_disturbed(tables)]
    if experiment["figure"] == "bars" and "preemptions" in points and not points["preemptions"].any():
        flags.append("No request was preempted at these rates: the figure shows no effect of preemption")
    return flags


def _not_monotone(tables: Tables) -> Iterator[str]:
    if tables.experiment["figure"] in _OVER_LOAD:
        falls = [
            (title, fall)
            for metric in _metrics(tables)
            for panel, title in _titles(tables).items()
            for fall in _falls(tables, panel, metric)
        ]
        if falls:
            yield f"Not monotone over the load: {_by_panel(falls)}"
    capacity = tables.capacity
    if capacity is not None and "paper_monotone" in capacity:
        theirs = capacity[capacity["paper_monotone"].eq(False)]
        if len(theirs):
            titles = _titles(tables)
            panels = (titles[panel] for panel in theirs["panel"])
            # Several of our series may be held against one curve of the paper.
            curves = dict.fromkeys(zip(panels, theirs["paper_system"], strict=True))
            yield f"Not monotone in the paper: {_by_panel(curves)}"


def _falls(tables: Tables, panel: str, metric: str) -> Iterator[str]:
    """Name the curves of a panel that get better as the load rises, and the largest improvement."""
    for series in tables.series:
        mean = tables.curve(panel, series["name"], metric).mean
        mean = mean[~np.isnan(mean)]
        if metric.startswith("slo_attainment_"):
            rise = float(np.max(mean - np.minimum.accumulate(mean), initial=0.0))
            if rise > 0:
                scale = metric.rpartition("_")[2]
                yield f"{series['label']} (up {100 * rise:.2g} points, SLO × {scale})"
        elif not is_monotone(mean):
            yield f"{series['label']} (down {percent(largest_fall(mean))})"


def _missing(tables: Tables) -> Iterator[str]:
    """Name points without a value, where no request finished."""
    metrics = [metric for metric in _metrics(tables) if metric in tables.points]
    missing = tables.points[tables.points[metrics].isna().any(axis=1)]
    named = []
    for panel, label, rows in _by_series(tables, missing):
        where = ", ".join(map(x_key, ordered(rows["x"])))
        named.append((panel, f"{label} at {where}"))
    if named:
        yield f"Omitted, at least one seed has no value: {_by_panel(named)}"


def _unpaired(tables: Tables) -> Iterator[str]:
    """Name points of a figure of ratios where the reference series has no value, or is 0."""
    if tables.experiment["figure"] != "ratios":
        return
    over = next(series for series in tables.series if series["name"] == tables.experiment["over"])
    named: dict[tuple[str, str], None] = {}
    for metric in tables.metrics:
        for panel, title in _titles(tables).items():
            reference = tables.curve(panel, over["name"], metric)
            usable = [x for x, mean in zip(reference.x, reference.mean, strict=True) if mean != 0]
            for series in tables.series:
                curve = tables.curve(panel, series["name"], metric)
                where = ", ".join(x_key(x) for x in curve.x if x not in usable)
                if where and series is not over:
                    named[title, f"{series['label']} at {where}"] = None
    if named:
        yield f"Omitted, {over['label']} has no value there, or 0: {_by_panel(named)}"


def _failed(tables: Tables) -> Iterator[str]:
    """Name series with failed requests: their latencies cover only the finished requests."""
    if "failed" not in tables.points:
        return
    lost = tables.points[tables.points["failed"] > 0]
    named = [
        (panel, f"{label} ({rows['failed'].sum():g} of {rows['num_requests'].sum():g})")
        for panel, label, rows in _by_series(tables, lost)
    ]
    if named:
        yield f"Requests failed; latencies cover the finished requests: {_by_panel(named)}"


def _disturbed(tables: Tables) -> Iterator[str]:
    """Name runs of servers during which other processes kept cores busy."""
    if "other_cores" in tables.points:
        others = tables.points["other_cores"]
        if len(disturbed := others[others > OTHERS]):
            yield (
                f"In {len(disturbed)} of {len(others)} runs other processes used up to "
                f"{disturbed.max():.1f} cores: repeat on an idle machine"
            )


def _crowded(runs: pd.DataFrame) -> Iterator[str]:
    """Say so if other programs took processors while real runs were measured, as an experiment may allow."""
    if "processor_share" in runs and (share := runs["processor_share"].min()) < LEAST_SHARE:
        yield f"Other programs left {percent(share)} of the processors: the errors are partly theirs"


def _metrics(tables: Tables) -> list[str]:
    """The columns that a figure draws."""
    kind = tables.experiment["figure"]
    if kind == "slo":
        return [f"slo_attainment_{scale:g}" for scale in SLO_SCALES]
    if kind == "deciles":
        return [f"slowdown_decile_{i}" for i in DECILES]
    return tables.metrics if kind in ("load", "capacity", "sweep", "ratios") else []


def _by_series(tables: Tables, rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The rows of each panel and series that has rows, with the names of both."""
    for panel, title in _titles(tables).items():
        for series in tables.series:
            own = rows[(rows["panel"] == panel) & (rows["series"] == series["name"])]
            if len(own):
                yield title, series["label"], own


def _titles(tables: Tables) -> dict[str, str]:
    """The title of a panel, found by its name."""
    return {panel["name"]: str(panel.get("title") or panel.get("x") or panel["name"]) for panel in tables.panels}


def _by_panel(named: Iterable[tuple[str, str]]) -> str:
    """Format (panel, series) pairs as "panel: series, series; panel: series"."""
    groups: dict[str, list[str]] = {}
    for panel, series in named:
        groups.setdefault(panel, []).append(series)
    return "; ".join(f"{panel}: {', '.join(group)}" if panel else ", ".join(group) for panel, group in groups.items())
