"""Targets held against results: each bounds a ratio of two series of one experiment, over many of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.intervals import Estimate, geometric_mean_of_ratios, ratio_of_means
from harness.analysis.points import paired
from harness.experiments.experiments import Experiment, x_key

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
Setting = tuple[str, str]
"""A panel and a value of x."""
Pair = tuple[np.ndarray, np.ndarray]
"""A metric under `of` and under `over`, both [seeds]."""


def targets_table(experiment: Experiment, points: pd.DataFrame) -> pd.DataFrame:
    """A row a target: the ratio with its 95 % interval over seeds, and whether it is at most what was aimed at.

    `settings` is how many combinations of panel and x went in, `where` the one with the largest ratio, whose interval
    is that of a `largest`. Without a value in any of them the target is `unknown`.
    Raises ConfigError for a metric that the points lack.
    """
    rows = [_row(target, _settings(target, experiment, points)) for target in experiment["targets"]]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _settings(target: Mapping[str, Any], experiment: Experiment, points: pd.DataFrame) -> dict[Setting, Pair]:
    """What both series measured in each setting of the target."""
    at = [x_key(x) for x in target.get("at") or ()]
    found: dict[Setting, Pair] = {}
    for panel in target.get("panels") or [panel["name"] for panel in experiment["panels"]]:
        of, over = paired(points, panel, target["of"], target["over"], target["metric"])
        for x in of.columns:
            if not at or x_key(x) in at:
                found[panel, x_key(x)] = of[x].to_numpy(), over[x].to_numpy()
    return found


def _row(target: Mapping[str, Any], settings: Mapping[Setting, Pair]) -> dict[str, Any]:
    ratios = {setting: ratio_of_means(*pair) for setting, pair in settings.items()}
    values = {setting: ratio.value for setting, ratio in ratios.items() if ratio.value is not None}
    estimate, where = Estimate(None), ""
    if values and len(values) == len(settings):
        worst = max(values, key=values.__getitem__)
        where = " at ".join(part for part in worst if part)
        estimate = ratios[worst]
        if target["statistic"] == "geometric_mean":
            of, over = (np.column_stack(side) for side in zip(*settings.values(), strict=True))
            estimate = geometric_mean_of_ratios(of, over)
    met = "unknown" if estimate.value is None else "yes" if estimate.value <= target["at_most"] else "no"
    return {
        **{key: target[key] for key in ("claim", "metric", "of", "over", "statistic", "at_most")},
        "at": ", ".join(x_key(x) for x in target.get("at") or ()),
        "settings": len(settings),
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "met": met,
        "where": where,
    }
