"""Targets of an experiment, held against its points: each bounds a ratio of two series, over many settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.intervals import (
    Estimate,
    geometric_mean_of_ratios,
    largest_ratio_of_means,
    ratio_of_means,
)
from harness.analysis.points import paired
from harness.experiments.experiment import Experiment, Target, x_key

COLUMNS = (
    "claim",
    "metric",
    "of",
    "over",
    "statistic",
    "at",
    "settings",
    "value",
    "low",
    "high",
    "at_most",
    "met",
    "where",
)
STATISTICS = {"geometric_mean": geometric_mean_of_ratios, "largest": largest_ratio_of_means}
"""What a target bounds: a statistic of the ratios of means in its settings."""
Setting = tuple[str, str]
"""A panel and a value of x."""
Pair = tuple[np.ndarray, np.ndarray]
"""A metric under `of` and under `over`, both [seeds]."""


def targets_table(experiment: Experiment, points: pd.DataFrame) -> pd.DataFrame:
    """A row a target: the ratio with its 95 % interval over seeds, and whether it is within the bound.

    `settings` counts the combinations of panel and x. `where` is the one with the largest ratio; the interval of a
    `largest` covers that it was chosen. Without a value in every setting the target is `unknown`. Raises ConfigError
    for a metric that the points lack.
    """
    rows = [_row(target, _settings(target, experiment, points)) for target in experiment.targets]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _settings(target: Target, experiment: Experiment, points: pd.DataFrame) -> dict[Setting, Pair]:
    """What both series measured in each setting of the target."""
    at = [x_key(x) for x in target.at or ()]
    found: dict[Setting, Pair] = {}
    for panel in target.panels or [panel.name for panel in experiment.panels]:
        of, over = paired(points, panel, target.of, target.over, target.metric)
        for x in of.columns:
            if not at or x_key(x) in at:
                found[panel, x_key(x)] = of[x].to_numpy(), over[x].to_numpy()
    return found


def _row(target: Target, settings: Mapping[Setting, Pair]) -> dict[str, Any]:
    ratios = {setting: ratio_of_means(*pair) for setting, pair in settings.items()}
    values = {setting: ratio.value for setting, ratio in ratios.items() if ratio.value is not None}
    estimate, where = Estimate(None), ""
    if values and len(values) == len(settings):
        worst = max(values, key=values.__getitem__)
        where = " at ".join(part for part in worst if part)
        of, over = (np.column_stack(side) for side in zip(*settings.values(), strict=True))
        estimate = STATISTICS[target.statistic](of, over)
    met = "unknown" if estimate.value is None else "yes" if estimate.value <= target.at_most else "no"
    return {
        "claim": target.claim,
        "metric": target.metric,
        "of": target.of,
        "over": target.over,
        "statistic": target.statistic,
        "at": ", ".join(x_key(x) for x in target.at or ()),
        "settings": len(settings),
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "at_most": target.at_most,
        "met": met,
        "where": where,
    }
