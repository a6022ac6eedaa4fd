"""How a claim is measured: a kind of measure, and what it takes of an experiment's points."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from harness.analysis.capacity import capacity_estimate, capacity_of, ratio_of_capacities
from harness.analysis.intervals import Estimate, largest_ratio_of_means, mean_estimate, ratio_of_means
from harness.analysis.points import FALLING, RERUN, by_seed, plotted_load, plotted_points
from harness.experiments.experiment import Experiment, x_key
from harness.experiments.files import Keys, Number, NumberOrText, Omittable


@dataclass(frozen=True)
class Evidence:
    """What claims are measured on: an experiment, its points, and the points the paper plotted for it."""

    experiment: Experiment
    points: pd.DataFrame
    reported: pd.DataFrame


def names_of(series: str | list[str] | None) -> list[str]:
    """The names of one series, several or none, as a list."""
    return [series] if isinstance(series, str) else list(series or ())


class OnPoints(Keys):
    """A measure on the points of an experiment."""

    is_ratio: ClassVar[bool] = False
    """Whether it is a ratio of two series: above 1 a gain."""

    experiment: str
    panel: Omittable[str] = None
    """The first panel if left out."""
    of: str
    """The series in question."""
    metric: Omittable[str] = None
    """In place of the experiment's."""

    @abstractmethod
    def estimate(self, on: Evidence) -> Estimate:
        """The value, its 95 % interval over seeds, and where one sample of the paper's size lies."""

    def rerun(self, on: Evidence) -> float | None:
        """The same measure on the points of the authors' rerun; None without such points."""
        return None

    def num_seeds(self, on: Evidence) -> int | None:
        """How many seeds it is measured with; None if on points of the authors."""
        return len(self.curves(on, self.of))

    def metric_on(self, on: Evidence) -> str:
        """The metric it is about."""
        return on.experiment.metric if self.metric is None else self.metric

    def curves(self, on: Evidence, series: str, metric: str | None = None) -> pd.DataFrame:
        """The curves of a series by seed: rows are seeds, columns values of x."""
        panel = on.experiment.panels[0].name if self.panel is None else self.panel
        return by_seed(on.points, panel, series, metric or self.metric_on(on))

    def curves_by_text(self, on: Evidence, series: str) -> pd.DataFrame:
        """The same, with the values of x as texts (`x_key`)."""
        return self.curves(on, series).rename(columns=x_key)


class AtBound(OnPoints):
    """A measure of the load at which the metric leaves its bound."""

    bound: Omittable[Number] = None
    """In place of the experiment's SLO."""

    def bound_on(self, on: Evidence) -> float:
        """The bound."""
        panel = on.experiment.panels[0].name if self.panel is None else self.panel
        bound = on.experiment.slo_of(panel) if self.bound is None else self.bound
        assert bound is not None
        return bound

    def is_falling(self, on: Evidence) -> bool:
        """Whether the metric falls as the load rises, so that the bound is a lower one."""
        return self.metric_on(on).startswith(FALLING)

    def loads(self, on: Evidence, series: str) -> tuple[np.ndarray, np.ndarray]:
        """Rates [rates] and the metric [seeds, rates]."""
        table = self.curves(on, series)
        return table.columns.to_numpy(float), table.to_numpy()

    def rerun_load(self, on: Evidence, series: str) -> float | None:
        """The load at which the authors' rerun of a series leaves the bound; None without points or crossing."""
        panel = on.experiment.panels[0].name if self.panel is None else self.panel
        if self.metric_on(on) != on.experiment.metric:
            return None
        return plotted_load(_plotted_points(panel, series, on, RERUN), self.bound_on(on), self.is_falling(on))


class Capacity(AtBound):
    """The load at the bound."""

    kind: Literal["capacity"]

    def estimate(self, on: Evidence) -> Estimate:
        """In requests per second."""
        return capacity_estimate(*self.loads(on, self.of), self.bound_on(on), falling=self.is_falling(on))

    def rerun(self, on: Evidence) -> float | None:
        """In requests per second."""
        return self.rerun_load(on, self.of)


class CapacityRatio(AtBound):
    """The load at the bound, of one series over another."""

    is_ratio: ClassVar[bool] = True

    kind: Literal["capacity_ratio"]
    over: str

    def estimate(self, on: Evidence) -> Estimate:
        """Above 1, `of` carries more."""
        curves = self.loads(on, self.of), self.loads(on, self.over)
        return ratio_of_capacities(*curves, self.bound_on(on), falling=self.is_falling(on))

    def rerun(self, on: Evidence) -> float | None:
        """Above 1, `of` carries more; None for two variants of one of the authors' systems."""
        systems = {each.paper_system for each in on.experiment.series if each.name in (self.of, self.over)}
        if len(systems) < 2:
            return None
        of, over = (self.rerun_load(on, series) for series in (self.of, self.over))
        return None if of is None or over is None else of / over


class Value(OnPoints):
    """The metric at x."""

    kind: Literal["value"]
    x: NumberOrText

    def estimate(self, on: Evidence) -> Estimate:
        """In the metric's unit."""
        return mean_estimate(self.curves_by_text(on, self.of)[x_key(self.x)].to_numpy())


class Ratio(OnPoints):
    """The metric of `over` over that of `of`, at x: above 1, `of` is the better."""

    is_ratio: ClassVar[bool] = True

    kind: Literal["ratio"]
    over: str
    x: NumberOrText

    def estimate(self, on: Evidence) -> Estimate:
        """Without a unit."""
        over, of = (self.curves_by_text(on, side)[x_key(self.x)].to_numpy() for side in (self.over, self.of))
        return ratio_of_means(over, of)


class XRatio(OnPoints):
    """The metric of one series at x over that at `over_x`."""

    kind: Literal["x_ratio"]
    x: NumberOrText
    over_x: NumberOrText

    def estimate(self, on: Evidence) -> Estimate:
        """Without a unit."""
        values = self.curves_by_text(on, self.of)
        return ratio_of_means(values[x_key(self.x)].to_numpy(), values[x_key(self.over_x)].to_numpy())


class MetricRatio(OnPoints):
    """One metric over another of the same series, at x."""

    kind: Literal["metric_ratio"]
    over_metric: str
    x: NumberOrText

    def estimate(self, on: Evidence) -> Estimate:
        """Without a unit, if both metrics have the same."""
        over, under = (
            self.curves(on, self.of, metric).rename(columns=x_key)[x_key(self.x)].to_numpy()
            for metric in (self.metric, self.over_metric)
        )
        return ratio_of_means(over, under)


class LargestRatio(OnPoints):
    """The largest ratio over all x, and over several series if `over` lists them."""

    is_ratio: ClassVar[bool] = True

    kind: Literal["largest_ratio"]
    over: str | list[str]

    def estimate(self, on: Evidence) -> Estimate:
        """Without a unit; the interval holds the largest true ratio, whichever x and series have it."""
        of = self.curves(on, self.of)
        over = {series: self.curves(on, series) for series in names_of(self.over)}
        shared = {series: [x for x in curves if x in of] for series, curves in over.items()}
        pairs = [(over[series][x], of[x]) for series, xs in shared.items() for x in xs]
        columns = range(len(pairs))
        return _largest_ratio(*(pd.concat(side, axis=1).set_axis(columns, axis=1) for side in zip(*pairs, strict=True)))


class LargestShare(OnPoints):
    """The largest share of the metric in another over all x, in per cent."""

    kind: Literal["largest_share"]
    share_of: str
    """The other metric."""

    def estimate(self, on: Evidence) -> Estimate:
        """In per cent; the interval holds the largest true share, whichever x has it."""
        part, whole = self.curves(on, self.of), self.curves(on, self.of, self.share_of)
        return _largest_ratio(100 * part, whole, on_logs=False)


class OnPlotted(AtBound):
    """A measure on the authors' own points: a load, or with `over` the ratio of two."""

    panel: str
    over: Omittable[str] = None
    source: Literal["paper", "rerun"] = "paper"
    """The paper's points, or those of its authors' rerun."""

    @abstractmethod
    def load(self, theirs: pd.DataFrame, bound: float) -> tuple[float | None, str]:
        """The load in the points of one series; or None, and why."""

    def num_seeds(self, on: Evidence) -> None:
        """Unknown: how many runs a point of the paper has is not said."""

    def estimate(self, on: Evidence) -> Estimate:
        """In requests per second, or without a unit; the authors give no intervals."""
        sides = [_plotted_points(self.panel, name, on, self.source) for name in (self.of, self.over) if name]
        found = [self.load(theirs, self.bound_on(on)) for theirs in sides]
        loads = [load for load, _ in found if load is not None]
        if len(loads) < len(found):
            return Estimate(None, note="; ".join(why for _, why in found if why))
        return Estimate(loads[0] / loads[1] if self.over else loads[0])


class Reported(OnPlotted):
    """At the first crossing of the bound."""

    kind: Literal["reported"]

    def load(self, theirs: pd.DataFrame, bound: float) -> tuple[float | None, str]:
        """The load in the points of one series; or None, and why."""
        return capacity_of(theirs["rate"], theirs["value"], bound)


class ReportedSorted(OnPlotted):
    """The same after sorting the points by latency, as the released scripts do.

    Where a curve falls, that joins points that are not neighbours.
    """

    kind: Literal["reported_sorted"]

    def load(self, theirs: pd.DataFrame, bound: float) -> tuple[float | None, str]:
        """The load in the points of one series."""
        rising = theirs.sort_values("value", kind="stable")
        return float(np.interp(bound, rising["value"], rising["rate"])), ""


class NoMeasure(Keys):
    """It cannot be measured here: the claim's reason says why."""

    kind: Literal["none"]


Measure = Annotated[
    Capacity
    | CapacityRatio
    | Value
    | Ratio
    | XRatio
    | MetricRatio
    | LargestRatio
    | LargestShare
    | Reported
    | ReportedSorted
    | NoMeasure,
    Field(discriminator="kind"),
]


def _largest_ratio(over: pd.DataFrame, under: pd.DataFrame, *, on_logs: bool = True) -> Estimate:
    """The largest ratio of two metrics' means [seeds, x], over every x at which each seed has both."""
    over, under = over.align(under, join="inner", axis=1)
    complete = over.notna().all() & under.notna().all() & (under.mean() != 0)
    return largest_ratio_of_means(over.loc[:, complete], under.loc[:, complete], on_logs=on_logs)


def _plotted_points(panel: str, series: str, on: Evidence, source: str) -> pd.DataFrame:
    """What the paper, or its authors' rerun, has for a series; empty if nothing."""
    systems = {each.name: each.paper_system for each in on.experiment.series}
    return plotted_points(on.reported, source, panel, systems[series])
