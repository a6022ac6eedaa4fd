"""Claims held against results: each is measured on an experiment's points and gets a verdict."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, model_validator

from fastserve.core.errors import ConfigError
from harness.analysis.intervals import Estimate
from harness.analysis.measures import Evidence, Measure, NoMeasure
from harness.experiments.experiment import Experiment
from harness.experiments.files import Keys, Omittable, Positive, Text, check_differ, rule

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

Range = tuple[float, float]
"""The lowest and the highest value that the paper claims."""


class Claim(Keys):
    """A claim, and the measure it is held against."""

    id: Annotated[
        str,
        Field(pattern=r"^[a-z0-9]+(-[a-z0-9.]+)*$"),
        rule("must be a name of small letters and digits, with single hyphens between them"),
    ]
    group: Literal["paper", "suspicion", "beyond"]
    claim: Text
    """In a sentence."""
    source: Text
    """Where it is made."""
    paper: Omittable[Annotated[int | float | list[int | float], rule("must be a number, or a list of them")]] = None
    """The value claimed, or its lowest and highest; left out for a finding of our own."""
    relation: Literal["equal", "at_most", "at_least"] = "equal"
    """equal: within the tolerance of the value. at_most, at_least: on its side."""
    tolerance: Positive = TOLERANCE
    """Relative difference up to which it is reproduced."""
    measure: Measure
    reason: Omittable[str] = None
    """Why it differs; {id} stands for the value of another claim."""

    @property
    def paper_range(self) -> Range | None:
        """What the paper claims; None for a finding of our own."""
        if self.paper is None:
            return None
        values = self.paper if isinstance(self.paper, list) else [self.paper]
        return float(min(values)), float(max(values))

    @property
    def quoted(self) -> set[str]:
        """The claims whose values its reason quotes."""
        return {name for _, name, _, _ in string.Formatter().parse(self.reason or "") if name}

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if isinstance(self.measure, NoMeasure) and self.reason is None:
            raise ValueError("it cannot be measured and does not say why; give a reason")
        return self


class Claims(Keys):
    """Claims that are held against the results."""

    claims: Annotated[tuple[Claim, ...], Field(strict=False)]

    @property
    def experiments(self) -> list[str]:
        """The experiments that the claims are measured on."""
        return sorted({claim.measure.experiment for claim in self.claims if not isinstance(claim.measure, NoMeasure)})

    @model_validator(mode="after")
    def _check(self) -> Claims:
        ids = [claim.id for claim in self.claims]
        check_differ(ids, "ids of claims")
        for claim in self.claims:
            if unknown := claim.quoted - set(ids):
                names = ", ".join(sorted(unknown))
                raise ValueError(f"claim {claim.id!r}: its reason refers to claims that are not there: {names}")
        return self


def check_claims(claims: Claims, experiments: Mapping[str, Experiment], source: Path | str) -> None:
    """Raise ConfigError, with file and claim, for an experiment, panel or series that is not there."""
    for claim in claims.claims:
        measure = claim.measure
        if isinstance(measure, NoMeasure):
            continue
        where = f"{source}: claim {claim.id!r}: measure"
        experiment = experiments.get(measure.experiment)
        if experiment is None:
            raise ConfigError(f"{where}: no experiment {measure.experiment!r}; there are: {', '.join(experiments)}")
        panels = [panel.name for panel in experiment.panels]
        series = [series.name for series in experiment.series]
        for key, names in (("panel", panels), ("of", series), ("over", series)):
            name = getattr(measure, key, None)
            if name is not None and name not in names:
                raise ConfigError(f"{where}: {key} {name!r} is not in {measure.experiment}: {', '.join(names)}")


def claims_table(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> pd.DataFrame:
    """A row a claim: the paper's value, the measured one with its 95 % interval, the difference, the verdict.

    `paper_low` and `paper_high` differ where the paper gives a range. A row without a paper's value is a finding of
    our own.
    """
    estimates = {claim.id: _estimate(claim, evidence) for claim in claims}
    shown = {name: _shown(estimate) for name, estimate in estimates.items()}
    rows = []
    for claim in claims:
        estimate, paper = estimates[claim.id], claim.paper_range
        difference = relative_difference(estimate.value, paper, claim.relation)
        rows.append(
            {
                "id": claim.id,
                "group": claim.group,
                "claim": claim.claim,
                "source": claim.source,
                "experiment": getattr(claim.measure, "experiment", None),
                "panel": getattr(claim.measure, "panel", None),
                "paper_low": paper[0] if paper else None,
                "paper_high": paper[1] if paper else None,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "relative_difference": difference,
                "verdict": verdict(claim, estimate, paper, difference),
                "reason": " ".join(filter(None, [(claim.reason or "").format(**shown), _note(estimate)])),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def relative_difference(value: float | None, paper: Range | None, relation: str) -> float | None:
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


def verdict(claim: Claim, estimate: Estimate, paper: Range | None, difference: float | None) -> str:
    """`reproduced` within the tolerance; `partly` if it differs more and points the same way; else `not`.

    A gain (above 1) points the same way if its whole interval is above 1; any other number within a factor of two.
    """
    if isinstance(claim.measure, NoMeasure):
        return CANNOT_BE
    if paper is None:
        return FOUND
    if difference is not None and abs(difference) <= claim.tolerance:
        return REPRODUCED
    if claim.measure.is_ratio and paper[0] > 1:
        least = estimate.value if estimate.low is None else estimate.low
        same_way = least is not None and least > 1
    else:
        same_way = difference is not None and 0.5 <= 1 + difference <= 2
    return PARTLY if same_way else NOT


def _estimate(claim: Claim, evidence: Mapping[str, Evidence]) -> Estimate:
    if isinstance(claim.measure, NoMeasure):
        return Estimate(None)
    return claim.measure.estimate(evidence[claim.measure.experiment])


def _note(estimate: Estimate) -> str:
    return f"({estimate.note}.)" if estimate.note else ""


def _shown(estimate: Estimate) -> str:
    """For a sentence: the value and its interval."""
    if estimate.value is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
