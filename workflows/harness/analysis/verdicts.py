"""Verdicts on the paper's claims, by the rules of docs/verdicts.md, which were fixed before any result was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from harness.analysis.intervals import Estimate

CONSISTENT, ATTENUATED, INFLATED = "consistent", "attenuated", "inflated"
DIRECTION_ONLY, CONTRADICTED, UNTESTABLE, FOUND = "direction only", "contradicted", "untestable", "found"
VERDICTS = (CONSISTENT, ATTENUATED, INFLATED, DIRECTION_ONLY, CONTRADICTED, UNTESTABLE, FOUND)
RETEST_SPREAD, RETEST_SPREAD_OVER_VLLM = 0.15, 0.2
"""How far, in log, the authors' ratios moved when they measured again: root mean squares, over FCFS and of all."""
LEAST_RETAINED, MOST_RETAINED = 0.5, 1.5
"""Shares of the claimed effect between which a number attenuates or inflates it."""
FALSE_DISCOVERY_RATE = 0.05

Range = tuple[float, float]
"""The lowest and the highest value that the paper claims."""
Relation = Literal["equal", "at_most", "at_least"]


def verdict(
    paper: Range,
    relation: Relation,
    estimate: Estimate,
    *,
    is_comparison: bool,
    q_value: float | None,
    retest_spread: float,
) -> str:
    """Judge what the paper claims by our estimate; an estimate without an interval leaves it untestable.

    `q_value` is the p-value of a comparison adjusted for the family (`q_values`).
    """
    if estimate.sample_low is None or estimate.sample_high is None:
        return UNTESTABLE
    direction = shown_direction(estimate, q_value) if is_comparison else 0
    claimed = claimed_direction(paper)
    opposite = is_comparison and direction == -claimed != 0
    if _may_be_a_sample(paper, relation, estimate, retest_spread) and not opposite:
        return CONSISTENT
    if is_comparison and (direction == 0 or direction != claimed):
        return CONTRADICTED
    retained = retained_effect(estimate.value, paper, relation, is_comparison)
    if retained is not None and LEAST_RETAINED <= retained <= MOST_RETAINED:
        return ATTENUATED if retained <= 1 else INFLATED
    return DIRECTION_ONLY if is_comparison else CONTRADICTED


def retained_effect(value: float | None, paper: Range | None, relation: Relation, is_comparison: bool) -> float | None:
    """The share of the claimed effect that we find: of comparisons in log, of absolute numbers plainly.

    It is relative to the nearest number that the paper claims, so that a value within what is claimed retains 1. None
    without a value, or if no effect is claimed.
    """
    if value is None or paper is None:
        return None
    low, high = claimed_range(paper, relation)
    nearest = min(max(value, low), high)
    if value == nearest:
        return 1.0
    if not is_comparison:
        return value / nearest if nearest else None
    if min(value, nearest) <= 0 or nearest == 1:
        return None
    return math.log(value) / math.log(nearest)


def q_values(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of a family so that those up to a bound hold at most that share of false alarms (BH)."""
    from scipy.stats import false_discovery_control  # Slow to import.

    given = [i for i, p_value in enumerate(p_values) if p_value is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    if given:
        for i, q_value in zip(given, false_discovery_control([p_values[i] for i in given]), strict=True):
            adjusted[i] = float(q_value)
    return adjusted


def shown_direction(estimate: Estimate, q_value: float | None) -> int:
    """1 for a gain (above 1) and -1 for a loss that is shown at the false discovery rate; 0 if neither is."""
    if q_value is None or q_value > FALSE_DISCOVERY_RATE or estimate.low is None or estimate.high is None:
        return 0
    return 1 if estimate.low > 1 else -1 if estimate.high < 1 else 0


def claimed_direction(paper: Range) -> int:
    """1 for a claimed gain (above 1), -1 for a loss, 0 for a range that holds 1."""
    return 1 if paper[0] > 1 else -1 if paper[1] < 1 else 0


def claimed_range(paper: Range, relation: Relation) -> Range:
    """Every value that agrees with the claim."""
    low, high = paper
    return (-math.inf if relation == "at_most" else low), (math.inf if relation == "at_least" else high)


def _may_be_a_sample(paper: Range, relation: Relation, estimate: Estimate, retest_spread: float) -> bool:
    """Whether the prediction interval, wider by the retest spread on both sides, holds a value that is claimed."""
    assert estimate.sample_low is not None
    assert estimate.sample_high is not None
    low, high = claimed_range(paper, relation)
    widened_low, widened_high = widened(estimate.sample_low, estimate.sample_high, retest_spread)
    return widened_low <= high and low <= widened_high


def widened(low: float, high: float, retest_spread: float) -> Range:
    """An interval that is wider by the retest spread on both sides; a number of another sign moves outwards too."""
    factor = math.exp(retest_spread)
    return (low / factor if low > 0 else low * factor), (high * factor if high > 0 else high / factor)
