"""An experiment and its tables, as the figures read them; computes means and ratios over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.intervals import Estimate, mean_estimate, ratio_of_means
from harness.analysis.points import PAPER, paired

X = float | str
"""The x of a point: a number, or a category such as "never"."""


@dataclass(frozen=True)
class Curve:
    """A metric over x for one series: the mean over seeds at each x, and its 95 % interval.

    `x` holds numbers in rising order, then categories in the table's order. The mean is NaN if a seed has no value; the
    interval is NaN then, and for fewer than three seeds.
    """

    x: tuple[X, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Tables:
    """An experiment with its points, capacities and the points of FastServe's authors.

    The tables may come from CSV files, which turn some names into numbers or missing values; these are restored.
    """

    def __init__(
        self,
        experiment: Mapping[str, Any],
        points: pd.DataFrame,
        capacity: pd.DataFrame | None = None,
        reported: pd.DataFrame | None = None,
    ) -> None:
        self.experiment = experiment
        self.points = _with_names(points)
        self.capacity = None if capacity is None else _with_names(capacity)
        self.reported = pd.DataFrame(columns=["panel", "source", "system", "rate", "value"])
        if reported is not None:
            self.reported = _with_names(reported)
        self._curves: dict[tuple[str, str, str], Curve] = {}

    @property
    def panels(self) -> Sequence[Mapping[str, Any]]:
        """The experiment's panels, at least one."""
        panels: Sequence[Mapping[str, Any]] = self.experiment["panels"]
        return panels

    @property
    def series(self) -> Sequence[Mapping[str, Any]]:
        """The experiment's series; a panel may lack some of them."""
        series: Sequence[Mapping[str, Any]] = self.experiment["series"]
        return series

    @property
    def metrics(self) -> list[str]:
        """The drawn columns: `metrics`, or `metric` alone."""
        return list(self.experiment.get("metrics") or [self.experiment["metric"]])

    def x_label(self) -> str:
        """The label of the x axis: the request rate unless the experiment says otherwise."""
        return str((self.experiment.get("x") or {}).get("label") or "Request rate (requests/s)")

    def x_log(self) -> bool:
        """Whether the experiment asks for a logarithmic x axis."""
        return bool((self.experiment.get("x") or {}).get("log", False))

    def rows(self, panel: str, series: str) -> pd.DataFrame:
        """The points of one series in one panel."""
        return self.points[(self.points["panel"] == panel) & (self.points["series"] == series)]

    def shows(self, source: str) -> bool:
        """Whether there are points of the paper, or of its authors' rerun."""
        return bool((self.reported["source"] == source).any())

    def slo(self, panel: Mapping[str, Any]) -> float | None:
        """The bound on the metric in a panel."""
        own = panel.get("slo")
        bound: float | None = self.experiment.get("slo") if own is None else own
        return bound

    def xs(self, panel: str) -> list[X]:
        """Every x of a panel with a point of any series: numbers in rising order, then categories."""
        return ordered(self.points.loc[self.points["panel"] == panel, "x"])

    def measured(self, panel: str, series: str) -> tuple[float, float] | None:
        """The lowest and the highest number at which a series has a point; None without one."""
        numbers = [x for x in ordered(self.rows(panel, series)["x"]) if isinstance(x, float)]
        return (numbers[0], numbers[-1]) if numbers else None

    def curve(self, panel: str, series: str, metric: str) -> Curve:
        """`metric` over x, as mean over seeds. Raises ConfigError if the points have no such column."""
        known = self._curves.get((panel, series, metric))
        if known is not None:
            return known
        rows = self.rows(panel, series)
        if metric not in rows:
            raise ConfigError(f"the points have no column {metric!r}; there are: {', '.join(rows.columns)}")
        xs = [as_x(x) for x in rows["x"]]
        found = ordered(xs)
        values = pd.to_numeric(rows[metric]).to_numpy(dtype=float)
        statistics = [mean_and_interval(values[[x == at for x in xs]]) for at in found]
        mean, low, high = np.array(statistics).reshape(-1, 3).T
        curve = Curve(tuple(found), mean, low, high)
        self._curves[panel, series, metric] = curve
        return curve

    def ratio(self, panel: str, series: str, over: str, metric: str) -> Curve:
        """The ratio of two series' `metric`, of the same seeds, at every x where both have points.

        Raises ConfigError if the points have no such column.
        """
        of, under = (table.rename(columns=as_x) for table in paired(self.points, panel, series, over, metric))
        found = ordered(list(of.columns))
        ratios = [_numbers(ratio_of_means(of[x].to_numpy(), under[x].to_numpy())) for x in found]
        return Curve(tuple(found), *np.array(ratios).reshape(-1, 3).T)

    def paper(self, panel: str, series: Mapping[str, Any], source: str = PAPER) -> pd.DataFrame:
        """The points that the paper, or its authors' rerun, has for a series: rate and value, by rate; may be empty."""
        reported = self.reported[self.reported["source"] == source]
        system = series.get("paper_system")
        return reported[(reported["panel"] == panel) & (reported["system"] == system)].sort_values("rate")

    def capacity_of(self, panel: str, series: str, metric: str) -> Mapping[str, Any] | None:
        """The row of the capacity table for one series; None without one."""
        if self.capacity is None:
            return None
        table = self.capacity
        if "metric" in table:
            table = table[table["metric"] == metric]
        found = table[(table["panel"] == panel) & (table["series"] == series)]
        return None if found.empty else {str(name): value for name, value in found.iloc[0].items()}


def mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval; NaN if `harness.analysis.intervals` gives None."""
    if not len(values):
        return math.nan, math.nan, math.nan
    return _numbers(mean_estimate(values))


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    value, low, high = (math.nan if end is None else end for end in (estimate.value, estimate.low, estimate.high))
    return value, low, high


def as_x(value: object) -> X:
    """Read a table's x as a number, or else as a category. Raises ConfigError if it is missing."""
    try:
        x = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(x):
        raise ConfigError('a point has no x; give a number, or a word such as "never" (a CSV reads "none" as missing)')
    return "∞" if math.isinf(x) else x


def ordered(values: Sequence[object] | pd.Series) -> list[X]:
    """Sort values: numbers in rising order, then categories in the order given; each once."""
    xs = list(dict.fromkeys(as_x(value) for value in values))
    return sorted(x for x in xs if isinstance(x, float)) + [x for x in xs if isinstance(x, str)]


def _with_names(table: pd.DataFrame) -> pd.DataFrame:
    """Turn names of panels and series into text: a CSV reads "" as missing and "16" as a number."""
    if "panel" not in table:
        table = table.assign(panel="")
    named = {column: table[column].map(_name).astype(object) for column in ("panel", "series") if column in table}
    return table.assign(**named)


def _name(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:g}"
    return str(value)
