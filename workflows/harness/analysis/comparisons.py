"""Comparisons of an experiment: the load of one series over another's, in every panel that has both."""

from __future__ import annotations

import pandas as pd

from harness.analysis.capacity import Curves, capacity_of, ratio_of_capacities
from harness.analysis.intervals import mean_over_seeds
from harness.analysis.points import FALLING, PAPER, RERUN, by_seed, plotted_load, plotted_points
from harness.experiments.experiment import Experiment

COLUMNS = (
    "panel",
    "label",
    "of",
    "over",
    "slo",
    "ratio",
    "low",
    "high",
    "of_load",
    "over_load",
    "paper_ratio",
    "paper_over_load",
    "rerun_ratio",
    "rerun_over_load",
    "note",
)


def comparisons_table(experiment: Experiment, points: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """A row a panel and comparison: both loads, their ratio with its 95 % interval, and the authors' own.

    Loads are in requests per second, of the mean over seeds. `paper_` and `rerun_` are the same by the points of the
    paper and of its authors' rerun. What is not known is empty, and `note` says why.
    """
    series = {each.name: each for each in experiment.series}
    falling = experiment.metric.startswith(FALLING)
    rows = []
    for panel in experiment.panels:
        slo = experiment.slo_of(panel.name)
        assert slo is not None
        for comparison in experiment.comparisons:
            sides = comparison.of, comparison.over
            found = [by_seed(points, panel.name, side, experiment.metric) for side in sides]
            if any(table.empty for table in found):
                continue
            of, over = ((table.columns.to_numpy(float), table.to_numpy()) for table in found)
            estimate = ratio_of_capacities(of, over, slo, falling=falling)
            row = {
                "panel": panel.name,
                "label": comparison.label,
                "of": comparison.of,
                "over": comparison.over,
                "slo": slo,
                "ratio": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "of_load": _load(of, slo, falling),
                "over_load": _load(over, slo, falling),
                "note": estimate.note,
            }
            for source in (PAPER, RERUN):
                of_load, over_load = (
                    plotted_load(plotted_points(reported, source, panel.name, series[side].paper_system), slo, falling)
                    for side in sides
                )
                row |= {
                    f"{source}_ratio": of_load / over_load if of_load and over_load else None,
                    f"{source}_over_load": over_load,
                }
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _load(curves: Curves, slo: float, falling: bool) -> float | None:
    rates, values = curves
    return capacity_of(rates, mean_over_seeds(values), slo, falling=falling)[0]
