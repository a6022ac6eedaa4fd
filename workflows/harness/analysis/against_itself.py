"""An A/A test: each series against itself, with other seeds. Intervals that often show a difference are too narrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from harness.analysis.capacity import ratio_of_capacities
from harness.analysis.intervals import LEAST_SEEDS, LEVEL
from harness.analysis.points import FALLING, by_seed
from harness.analysis.verdicts import FALSE_DISCOVERY_RATE, q_values
from harness.experiments.experiment import Experiment

COLUMNS = ("experiment", "panel", "series", "metric", "seeds_a_side", "comparisons", "wins", "wins_adjusted")
SEEDS_A_SIDE = (5, 10)
NUM_SPLITS = 100
Sides = tuple[np.ndarray, np.ndarray]
"""Positions of each side's seeds."""


def against_itself_table(experiments: Mapping[str, tuple[Experiment, pd.DataFrame]]) -> pd.DataFrame:
    """Compare each series' load at the SLO with its own: a row per experiment, panel, series and seeds a side.

    Takes experiments and their points. Seeds are drawn for two sides that share none, the same for all series. `wins`
    counts the ratios whose interval excludes 1: 5 % of the comparisons, if the intervals are right. `wins_adjusted`
    counts those left when all comparisons of one draw are adjusted together, as the claims are. An experiment without
    an SLO, or with fewer than six seeds, has no rows.
    """
    rows = [row for name, (experiment, points) in experiments.items() for row in _rows(name, experiment, points)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def splits(num_seeds: int) -> Iterator[Sides]:
    """Draw two sides of 5 and of 10 seeds, NUM_SPLITS times each; of too few seeds, of half. The same at every call."""
    rng = np.random.default_rng(0)
    sizes = [size for size in SEEDS_A_SIDE if 2 * size <= num_seeds] or [num_seeds // 2]
    for size in sizes:
        for _ in range(NUM_SPLITS if size >= LEAST_SEEDS else 0):
            drawn = rng.permutation(num_seeds)
            yield drawn[:size], drawn[size : 2 * size]


def _rows(name: str, experiment: Experiment, points: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    if experiment.slo is None:
        return
    tables = {
        (panel.name, series.name): by_seed(points, panel.name, series.name, experiment.metric)
        for panel in experiment.panels
        for series in experiment.series
    }
    tables = {place: table for place, table in tables.items() if not table.empty}
    counts: dict[tuple[str, str, int], np.ndarray] = {}
    for sides in splits(min(map(len, tables.values()), default=0)):
        p_values = [_p_value(experiment, panel, table, sides) for (panel, _), table in tables.items()]
        for place, p_value, q_value in zip(tables, p_values, q_values(p_values), strict=True):
            if p_value is not None and q_value is not None:
                count = counts.setdefault((*place, len(sides[0])), np.zeros(3, dtype=int))
                count += 1, p_value <= 1 - LEVEL, q_value <= FALSE_DISCOVERY_RATE
    for (panel, series, size), count in counts.items():
        yield name, panel, series, experiment.metric, size, *count.tolist()


def _p_value(experiment: Experiment, panel: str, table: pd.DataFrame, sides: Sides) -> float | None:
    """Of the ratio of one side's load to the other's being 1; table [seeds, rates]."""
    bound = experiment.slo_of(panel)
    assert bound is not None
    rates = table.columns.to_numpy(dtype=float)
    one, other = ((rates, table.to_numpy()[side]) for side in sides)
    return ratio_of_capacities(one, other, bound, falling=experiment.metric.startswith(FALLING)).p_value


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Sum a table over panels and series: the shares of wins by experiment and seeds a side, in the table's order."""
    counts = ["comparisons", "wins", "wins_adjusted"]
    total = table.groupby(["experiment", "seeds_a_side"], sort=False)[counts].sum().reset_index()
    ratios = {name.replace("wins", "share"): total[name] / total["comparisons"] for name in counts[1:]}
    return total.assign(**ratios)
