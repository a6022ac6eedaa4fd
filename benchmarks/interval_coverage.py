"""How often 95 % intervals over seeds hold the truth: our jackknife-t, and the percentile bootstrap for comparison.

Seeds are made up, with a truth that is known. A seed scales everything that is measured with it (heavy traffic is heavy
for both policies and at all rates), and each value varies on its own. Prints the table of docs/verdicts.md:

    python benchmarks/interval_coverage.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.analysis.against_itself import splits
from harness.analysis.capacity import capacity_estimate, crossings, ratio_of_capacities
from harness.analysis.intervals import (
    LEVEL,
    Estimate,
    FloatArray,
    Selections,
    largest_ratio_of_means,
    means_of,
    ratio_of_means,
)

SEEDS = (5, 10, 20)
REPETITIONS, DRAWS, SETS = 4000, 1000, 200
COMMON, OWN = 0.4, 0.3
"""Standard deviations, in log, of what a seed does to all that is measured with it, and of what it does to each."""
RATES = np.arange(1.0, 17)
CURVE = 0.05 * np.exp(0.35 * RATES)
"""Expected latency (s/token) over the rate, of the slower policy."""
BOUND, FASTER = 0.3, 1.6
LARGEST = np.array([1.5, 1.6, 1.7, 1.8, 1.8])
"""The true ratio at each of five x."""

Statistic = Callable[[Selections], FloatArray]


@dataclass(frozen=True)
class Case:
    """A statistic: its truth, how it is estimated, and how the bootstrap computes it of a draw.

    `measure` makes both sides of a measurement [seeds, x] from a number of seeds.
    """

    name: str
    truth: float
    measure: Callable[[np.random.Generator, int], tuple[FloatArray, FloatArray]]
    estimate: Callable[[FloatArray, FloatArray], Estimate]
    of_draws: Callable[[FloatArray, FloatArray, Selections], FloatArray]


def noise(rng: np.random.Generator, num_seeds: int, size: int, own: float) -> tuple[FloatArray, FloatArray]:
    """Factors of mean 1 for both sides, [seeds, size] each, that share what a seed does to all."""
    common = rng.normal(0, COMMON, (num_seeds, 1))
    alone = rng.normal(0, own, (2, num_seeds, size))
    over, under = np.exp(common + alone - (COMMON**2 + own**2) / 2)
    return over, under


def ratio(own: float) -> Case:
    """A ratio of two means."""
    return Case(
        f"ratio of means, spread {own:g}",
        2.0,
        lambda rng, num_seeds: _scaled(noise(rng, num_seeds, 1, own), 2.0, 1.0),
        lambda over, under: ratio_of_means(over[:, 0], under[:, 0]),
        lambda over, under, draws: (means_of(over, draws) / means_of(under, draws))[:, 0],
    )


def load(values: FloatArray) -> FloatArray:
    """Where curves [..., rates] first cross the bound."""
    return crossings(RATES, values, BOUND)


def one_load() -> Case:
    """The load at which a mean curve first crosses a bound."""
    return Case(
        "load at a first crossing",
        float(load(CURVE)),
        lambda rng, num_seeds: _scaled(noise(rng, num_seeds, len(RATES), OWN), CURVE, 1.0),
        lambda over, _: capacity_estimate(RATES, over, BOUND),
        lambda over, _, draws: load(means_of(over, draws)),
    )


def ratio_of_loads() -> Case:
    """A ratio of the loads at which two mean curves first cross a bound."""
    fast_curve = 0.05 * np.exp(0.35 * RATES / FASTER)
    return Case(
        "ratio of loads at a first crossing",
        float(load(fast_curve) / load(CURVE)),
        lambda rng, num_seeds: _scaled(noise(rng, num_seeds, len(RATES), OWN), fast_curve, CURVE),
        lambda over, under: ratio_of_capacities((RATES, over), (RATES, under), BOUND),
        lambda over, under, draws: load(means_of(over, draws)) / load(means_of(under, draws)),
    )


def largest() -> Case:
    """The largest of five ratios of means, of which two are the largest in truth."""
    return Case(
        "largest of five ratios of means",
        float(LARGEST.max()),
        lambda rng, num_seeds: _scaled(noise(rng, num_seeds, len(LARGEST), OWN), LARGEST, 1.0),
        largest_ratio_of_means,
        lambda over, under, draws: (means_of(over, draws) / means_of(under, draws)).max(axis=1),
    )


CASES = {"ratio": ratio(OWN), "wide": ratio(1.0), "load": one_load(), "loads": ratio_of_loads(), "largest": largest()}


def coverage(case: Case, num_seeds: int, repetitions: int) -> dict[str, float]:
    """The share of repetitions in which each kind of interval holds the truth, or a further sample, by its name."""
    rng = np.random.default_rng(num_seeds)
    draws = rng.integers(num_seeds, size=(DRAWS, num_seeds), dtype=np.intp)
    held = {"bootstrap": 0, "jackknife-t": 0, "prediction": 0}
    for _ in range(repetitions):
        over, under = case.measure(rng, num_seeds)
        with np.errstate(invalid="ignore"):  # Of a draw in which neither curve crosses.
            drawn = np.sort(case.of_draws(over, under, draws))
        low, high = drawn[[int(0.025 * DRAWS), -1 - int(0.025 * DRAWS)]]
        held["bootstrap"] += bool(low <= case.truth <= high)
        estimate = case.estimate(over, under)
        assert estimate.low is not None
        assert estimate.high is not None
        held["jackknife-t"] += estimate.low <= case.truth <= estimate.high
        assert estimate.sample_low is not None
        assert estimate.sample_high is not None
        further = case.estimate(*case.measure(rng, 1)).value
        held["prediction"] += further is None or estimate.sample_low <= further <= estimate.sample_high
    return {name: count / repetitions for name, count in held.items()}


def false_alarms(num_sets: int) -> dict[int, FloatArray]:
    """The share of wins of a series against itself, by seeds a side: for each of the sets of 20 seeds.

    It is what results/headline/a-a.csv holds for one series, whose loads are made up here.
    """
    rng = np.random.default_rng(0)
    shares: dict[int, list[float]] = {}
    for _ in range(num_sets):
        curves = CURVE * noise(rng, 20, len(RATES), OWN)[0]
        wins: dict[int, list[bool]] = {}
        for sides in splits(20):
            one, other = ((RATES, curves[side]) for side in sides)
            p_value = ratio_of_capacities(one, other, BOUND).p_value
            wins.setdefault(len(sides[0]), []).append(p_value is not None and p_value <= 1 - LEVEL)
        for size, won in wins.items():
            shares.setdefault(size, []).append(float(np.mean(won)))
    return {size: np.array(found) for size, found in shares.items()}


def _scaled(factors: tuple[FloatArray, FloatArray], over: object, under: object) -> tuple[FloatArray, FloatArray]:
    return factors[0] * np.asarray(over), factors[1] * np.asarray(under)


def main() -> None:
    """Print a row for each statistic and number of seeds."""
    rows = functools.partial(coverage, repetitions=REPETITIONS)
    print("| statistic | seeds | percentile bootstrap | jackknife-t | prediction interval |\n|---|---|---|---|---|")
    for case in CASES.values():
        for num_seeds in SEEDS:
            shares = " | ".join(f"{100 * share:.1f} %" for share in rows(case, num_seeds).values())
            print(f"| {case.name} | {num_seeds} | {shares} |")
    for size, found in false_alarms(SETS).items():
        print(
            f"a load against itself, {size} seeds a side, {SETS} sets of 20 seeds: {100 * found.mean():.1f} % of "
            f"intervals exclude 1; by set {100 * found.std():.1f} points (standard deviation)"
        )


if __name__ == "__main__":
    main()
