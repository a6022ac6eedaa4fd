"""Claims held against results: each is measured on an experiment's points and gets a verdict."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.capacity import capacity_estimate, capacity_of, ratio_of_capacities
from harness.analysis.intervals import Estimate, mean_estimate, ratio_of_means
from harness.analysis.points import FALLING, by_seed
from harness.experiments.experiments import Experiment, x_key

Claim = Mapping[str, Any]
COLUMNS = (
    "id",
    "group",
    "claim",
    "source",
    "experiment",
    "panel",
    "paper_low",
    "paper_high",
    "value",
    "low",
    "high",
    "relative_difference",
    "verdict",
    "reason",
)
TOLERANCE = 0.2
"""Relative difference up to which a claim counts as reproduced, unless it says otherwise."""
REPRODUCED, PARTLY, NOT, CANNOT_BE, FOUND = "reproduced", "partly", "not", "cannot be", "found"


def claimed_experiments(claims: Sequence[Claim]) -> list[str]:
    """The experiments the claims are measured on."""
    return sorted({claim["measure"]["experiment"] for claim in claims if "experiment" in claim["measure"]})


def check_claims(claims: Sequence[Claim], experiments: Mapping[str, Experiment]) -> None:
    """Raise ConfigError for a claim that names what is not there, or lacks what its measure needs."""
    ids = [claim["id"] for claim in claims]
    for claim in claims:
        where = f"claim {claim['id']!r}"
        if ids.count(claim["id"]) > 1:
            raise ConfigError(f"{where} is there twice")
        measure = claim["measure"]
        unknown = {name for _, name, _, _ in string.Formatter().parse(claim.get("reason", "")) if name} - set(ids)
        if unknown:
            raise ConfigError(f"{where}: its reason refers to claims that are not there: {', '.join(sorted(unknown))}")
        if measure["kind"] == "none":
            if "reason" not in claim:
                raise ConfigError(f"{where} cannot be measured and does not say why: give a reason")
            continue
        missing = [key for key in _NEEDED[measure["kind"]] if key not in measure]
        if missing:
            raise ConfigError(f"{where}: measure {measure['kind']!r} needs {', '.join(missing)}")
        experiment = experiments.get(measure["experiment"])
        if experiment is None:
            raise ConfigError(f"{where}: no experiment {measure['experiment']!r}; there are: {', '.join(experiments)}")
        for key, part in (("panel", "panels"), ("of", "series"), ("over", "series")):
            names = [each["name"] for each in experiment[part]]
            if key in measure and measure[key] not in names:
                raise ConfigError(
                    f"{where}: {key} {measure[key]!r} is not in {measure['experiment']}: {', '.join(names)}"
                )


@dataclass(frozen=True)
class Evidence:
    """What claims are measured on: an experiment, its points, and the points the paper plotted for it."""

    experiment: Experiment
    points: pd.DataFrame
    reported: pd.DataFrame

    def values(self, measure: Mapping[str, Any], series: str, metric: str | None = None) -> pd.DataFrame:
        """The curves of a series by seed: rows are seeds, columns values of x."""
        panel = measure.get("panel", self.experiment["panels"][0]["name"])
        metric = metric or measure.get("metric", self.experiment["metric"])
        table = by_seed(self.points, panel, series, metric)
        return table.rename(columns=x_key) if "x" in measure else table


def claims_table(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> pd.DataFrame:
    """A row a claim: what the paper says, what was measured with its 95 % interval, how far that is off, the verdict.

    `paper_low` and `paper_high` differ where the paper gives a range. A row without a paper's value is a finding of
    our own.
    """
    estimates = {claim["id"]: _measured(claim["measure"], evidence) for claim in claims}
    shown = {name: _shown(estimate) for name, estimate in estimates.items()}
    rows = []
    for claim in claims:
        estimate, paper = estimates[claim["id"]], _range(claim.get("paper"))
        difference = relative_difference(estimate.value, paper, claim.get("relation", "equal"))
        rows.append(
            {
                "id": claim["id"],
                "group": claim["group"],
                "claim": claim["claim"],
                "source": claim["source"],
                "experiment": claim["measure"].get("experiment"),
                "panel": claim["measure"].get("panel"),
                "paper_low": paper[0] if paper else None,
                "paper_high": paper[1] if paper else None,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "relative_difference": difference,
                "verdict": verdict(claim, estimate, paper, difference),
                "reason": " ".join(filter(None, [claim.get("reason", "").format(**shown), _note(estimate)])),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def relative_difference(value: float | None, paper: tuple[float, float] | None, relation: str) -> float | None:
    """How far the value is outside what the paper claims, relative to the nearest claimed; 0 if it is inside."""
    if value is None or paper is None:
        return None
    low, high = paper
    if relation == "at_most":
        low = -math.inf
    elif relation == "at_least":
        high = math.inf
    if low < high and low <= value <= high:
        return 0.0
    nearest = low if value < low else high
    return value / nearest - 1


def verdict(claim: Claim, estimate: Estimate, paper: tuple[float, float] | None, difference: float | None) -> str:
    """`reproduced` within the tolerance; `partly` if it differs more and points the same way; else `not`.

    The same way is: a gain (above 1) stays one, with its whole interval above 1; for any other number, a factor of two.
    """
    if claim["measure"]["kind"] == "none":
        return CANNOT_BE
    if paper is None:
        return FOUND
    if difference is not None and abs(difference) <= claim.get("tolerance", TOLERANCE):
        return REPRODUCED
    if claim["measure"]["kind"] in _RATIOS and paper[0] > 1:
        least = estimate.value if estimate.low is None else estimate.low
        same_way = least is not None and least > 1
    else:
        same_way = difference is not None and 0.5 <= 1 + difference <= 2
    return PARTLY if same_way else NOT


def _measured(measure: Mapping[str, Any], evidence: Mapping[str, Evidence]) -> Estimate:
    if measure["kind"] == "none":
        return Estimate(None)
    return _MEASURES[measure["kind"]](measure, evidence[measure["experiment"]])


def _capacity(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    bound, falling = _bound(measure, on)
    return capacity_estimate(*_curves(on.values(measure, measure["of"])), bound, falling=falling)


def _capacity_ratio(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    bound, falling = _bound(measure, on)
    over, under = (_curves(on.values(measure, measure[side])) for side in ("of", "over"))
    return ratio_of_capacities(over, under, bound, falling=falling)


def _value(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    return mean_estimate(on.values(measure, measure["of"])[x_key(measure["x"])].to_numpy())


def _ratio(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    """How many times the metric of `over` is that of `of`: above 1, `of` is the better."""
    over, of = (on.values(measure, measure[side])[x_key(measure["x"])] for side in ("over", "of"))
    return ratio_of_means(over.to_numpy(), of.to_numpy())


def _x_ratio(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    values = on.values(measure, measure["of"])
    return ratio_of_means(values[x_key(measure["x"])].to_numpy(), values[x_key(measure["over_x"])].to_numpy())


def _largest_ratio(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    """The largest of these over all x, and its interval there."""
    over, of = (on.values(measure, measure[side]) for side in ("over", "of"))
    return _largest(ratio_of_means(over[x].to_numpy(), of[x].to_numpy()) for x in of.columns if x in over.columns)


def _largest_share(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    """The largest share of one metric in another over all x, in per cent."""
    part = 100 * on.values(measure, measure["of"])
    whole = on.values(measure, measure["of"], measure["share_of"])
    return _largest(ratio_of_means(part[x].to_numpy(), whole[x].to_numpy()) for x in part.columns)


def _largest(estimates: Iterable[Estimate]) -> Estimate:
    return max(estimates, key=lambda estimate: -np.inf if estimate.value is None else estimate.value)


def _reported(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    """The capacity in the paper's own points, by first upward crossing."""
    theirs = _reported_points(measure, on)
    value, note = capacity_of(theirs["rate"], theirs["value"], _bound(measure, on)[0])
    return Estimate(value, note=note)


def _reported_sorted(measure: Mapping[str, Any], on: Evidence) -> Estimate:
    """The same after sorting the points by latency, as the released scripts do: where a curve falls, that joins
    points that are not neighbours."""
    theirs = _reported_points(measure, on).sort_values("value", kind="stable")
    return Estimate(float(np.interp(_bound(measure, on)[0], theirs["value"], theirs["rate"])))


def _reported_points(measure: Mapping[str, Any], on: Evidence) -> pd.DataFrame:
    systems = {series["name"]: series["paper_system"] for series in on.experiment["series"]}
    reported = on.reported
    return reported[(reported["panel"] == measure["panel"]) & (reported["system"] == systems[measure["of"]])]


def _curves(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return table.columns.to_numpy(float), table.to_numpy()


def _bound(measure: Mapping[str, Any], on: Evidence) -> tuple[float, bool]:
    """The objective, and whether it is a lower bound."""
    metric = measure.get("metric", on.experiment["metric"])
    return measure.get("bound", on.experiment["slo"]), metric.startswith(FALLING)


_MEASURES: Mapping[str, Callable[[Mapping[str, Any], Evidence], Estimate]] = {
    "capacity": _capacity,
    "capacity_ratio": _capacity_ratio,
    "value": _value,
    "ratio": _ratio,
    "x_ratio": _x_ratio,
    "largest_ratio": _largest_ratio,
    "largest_share": _largest_share,
    "reported": _reported,
    "reported_sorted": _reported_sorted,
}
_NEEDED = {
    "capacity": ("experiment", "of"),
    "capacity_ratio": ("experiment", "of", "over"),
    "value": ("experiment", "of", "x"),
    "ratio": ("experiment", "of", "over", "x"),
    "x_ratio": ("experiment", "of", "x", "over_x"),
    "largest_ratio": ("experiment", "of", "over"),
    "reported": ("experiment", "panel", "of"),
    "reported_sorted": ("experiment", "panel", "of"),
    "largest_share": ("experiment", "of", "share_of"),
}
_RATIOS = ("capacity_ratio", "ratio", "largest_ratio")


def _range(paper: Any) -> tuple[float, float] | None:
    if paper is None:
        return None
    values = paper if isinstance(paper, list) else [paper]
    return float(min(values)), float(max(values))


def _note(estimate: Estimate) -> str:
    return f"({estimate.note}.)" if estimate.note else ""


def _shown(estimate: Estimate) -> str:
    """For a sentence: the value and its interval."""
    if estimate.value is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
