"""Claims held against results: each is measured on an experiment's points and gets a verdict."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, model_validator

from fastserve.core.errors import ConfigError
from harness.analysis.intervals import LEAST_SEEDS, Estimate
from harness.analysis.measures import Evidence, Measure, NoMeasure, names_of
from harness.analysis.verdicts import (
    FOUND,
    RETEST_SPREAD,
    RETEST_SPREAD_OVER_VLLM,
    UNTESTABLE,
    Range,
    Relation,
    q_values,
    retained_effect,
    verdict,
)
from harness.experiments.experiment import Experiment
from harness.experiments.files import Keys, Omittable, Positive, Text, check_differ, rule

COLUMNS = (
    "id",
    "group",
    "claim",
    "label",
    "kind",
    "source",
    "experiment",
    "panel",
    "paper_low",
    "paper_high",
    "rerun",
    "value",
    "low",
    "high",
    "sample_low",
    "sample_high",
    "num_seeds",
    "retained_effect",
    "p_value",
    "q_value",
    "verdict",
    "tuned",
    "reason",
)


class Claim(Keys):
    """A claim, and the measure it is held against."""

    id: Annotated[
        str,
        Field(pattern=r"^[a-z0-9]+(-[a-z0-9.]+)*$"),
        rule("must be a name of small letters and digits, with single hyphens between them"),
    ]
    group: Literal["paper", "inconsistency", "suspicion", "beyond"]
    """paper: claims that get a verdict. inconsistency: the authors' own numbers against each other."""
    claim: Text
    """In a sentence."""
    label: Omittable[Text] = None
    """In a few words, below the name of its figure; left out: the sentence."""
    source: Text
    """Where it is made."""
    paper: Omittable[Annotated[int | float | list[int | float], rule("must be a number, or a list of them")]] = None
    """The value claimed, or its lowest and highest; left out for a finding of our own."""
    relation: Relation = "equal"
    """equal: the value itself. at_most, at_least: any value on its side agrees."""
    retest_spread: Omittable[Positive] = None
    """How far the authors' own measurements of it differ, in log; left out: 0.15, and 0.2 over vLLM."""
    tuned: Omittable[Text] = None
    """The parameter that was tuned on this claim's own points; left out: none was."""
    measure: Measure
    reason: Omittable[str] = None
    """Why it differs; {id} stands for the value of another claim."""

    @property
    def is_comparison(self) -> bool:
        """Whether it is of one series over another."""
        return not isinstance(self.measure, NoMeasure) and self.measure.is_ratio

    def retest_spread_in(self, experiment: Experiment) -> float:
        """How far, in log, the authors' own measurements of it differ."""
        if self.retest_spread is not None:
            return self.retest_spread
        over = names_of(getattr(self.measure, "over", None))
        policies = {series.policy for series in experiment.series if series.name in over}
        is_over_vllm = any(policy.startswith("vllm") for policy in policies)
        return RETEST_SPREAD_OVER_VLLM if is_over_vllm else RETEST_SPREAD

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
            for name in names_of(getattr(measure, key, None)):
                if name not in names:
                    raise ConfigError(f"{where}: {key} {name!r} is not in {measure.experiment}: {', '.join(names)}")


def claims_table(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> pd.DataFrame:
    """A row a claim: the paper's value, its authors' rerun's, ours with its 95 % interval, and the verdict.

    `paper_low` and `paper_high` differ where the paper gives a range. `sample_low` to `sample_high` is the 95 %
    prediction interval of one sample of the paper's size. `q_value` is the p-value of a comparison adjusted for all
    comparisons of group paper; only these have one. docs/verdicts.md says what follows from them.
    """
    found = {claim.id: _measured(claim, evidence) for claim in claims}
    shown = {name: _shown(measured.estimate) for name, measured in found.items()}
    family = [claim for claim in claims if claim.group == "paper" and claim.is_comparison]
    adjusted = q_values([found[claim.id].estimate.p_value for claim in family])
    q_value_of = {claim.id: q_value for claim, q_value in zip(family, adjusted, strict=True)}
    rows = []
    for claim in claims:
        measured, paper = found[claim.id], claim.paper_range
        estimate = measured.estimate
        rows.append(
            {
                "id": claim.id,
                "group": claim.group,
                "claim": claim.claim,
                "label": claim.label or claim.claim,
                "kind": claim.measure.kind,
                "source": claim.source,
                "experiment": getattr(claim.measure, "experiment", None),
                "panel": getattr(claim.measure, "panel", None),
                "paper_low": paper[0] if paper else None,
                "paper_high": paper[1] if paper else None,
                "rerun": measured.rerun,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "sample_low": estimate.sample_low,
                "sample_high": estimate.sample_high,
                "num_seeds": measured.num_seeds,
                "retained_effect": retained_effect(estimate.value, paper, claim.relation, claim.is_comparison),
                "p_value": estimate.p_value if claim.is_comparison else None,
                "q_value": q_value_of.get(claim.id),
                "verdict": _verdict(claim, measured, q_value_of.get(claim.id), evidence),
                "tuned": claim.tuned,
                "reason": " ".join(filter(None, [(claim.reason or "").format(**shown), _note(measured)])),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"num_seeds": "Int64"})


@dataclass(frozen=True)
class _Measured:
    """What a claim's measure gives."""

    estimate: Estimate
    rerun: float | None = None
    num_seeds: int | None = None


def _measured(claim: Claim, evidence: Mapping[str, Evidence]) -> _Measured:
    if isinstance(claim.measure, NoMeasure):
        return _Measured(Estimate(None))
    on = evidence[claim.measure.experiment]
    return _Measured(claim.measure.estimate(on), claim.measure.rerun(on), claim.measure.num_seeds(on))


def _verdict(claim: Claim, measured: _Measured, q_value: float | None, evidence: Mapping[str, Evidence]) -> str:
    if claim.paper_range is None or claim.group != "paper":
        return FOUND
    if isinstance(claim.measure, NoMeasure):
        return UNTESTABLE
    return verdict(
        claim.paper_range,
        claim.relation,
        measured.estimate,
        is_comparison=claim.is_comparison,
        q_value=q_value,
        retest_spread=claim.retest_spread_in(evidence[claim.measure.experiment].experiment),
    )


def _note(measured: _Measured) -> str:
    """What limits the measure, as sentences."""
    estimate = measured.estimate
    too_few = measured.num_seeds is not None and measured.num_seeds < LEAST_SEEDS
    notes = [estimate.note, f"no interval: it needs {LEAST_SEEDS} seeds" if too_few else ""]
    ends = estimate.sample_low, estimate.sample_high
    if estimate.value and (math.inf in ends or -math.inf in ends or ends[0] == 0):  # A ratio is at least 0.
        notes.append("the prediction interval is open: the curve of some seed alone does not cross the bound")
    return " ".join(f"({note}.)" for note in notes if note)


def _shown(estimate: Estimate) -> str:
    """For a sentence: the value and its interval."""
    if estimate.value is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
