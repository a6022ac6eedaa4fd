"""95 % bootstrap intervals over seeds: percentile intervals (Efron and Tibshirani 1993, chapter 13).

A seed is one set of requests, the same for every policy and every rate. Seeds are therefore drawn whole: a draw takes
the same seeds for every rate of a curve, and for both sides of a comparison (paired). The draws are fixed, so the same
measurements give the same interval. Percentiles are order statistics and never interpolated, so infinities remain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Statistic = Callable[[NDArray[np.intp]], FloatArray]
"""Maps draws of seeds [draws, seeds] to the value of each draw [draws]."""
LEVEL = 0.95
DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value over all seeds and its interval. An unknown value or end is None, and `note` gives the reason.

    An end of -inf or inf is open: it lies beyond the measured range. Fewer than two seeds give no interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


def estimate_of(statistic: Statistic, num_seeds: int) -> Estimate:
    """Compute the statistic of all seeds, and its interval over draws of seeds."""
    value = float(statistic(np.arange(num_seeds)[np.newaxis])[0])
    if num_seeds < 2:
        return Estimate(value)
    drawn = statistic(seed_draws(num_seeds))
    return Estimate(value, *percentile_interval(drawn, drawn))


@cache
def seed_draws(num_seeds: int) -> NDArray[np.intp]:
    """Seeds drawn with replacement [DRAWS, num_seeds], the same at every call."""
    draws = np.random.default_rng(0).integers(num_seeds, size=(DRAWS, num_seeds), dtype=np.intp)
    draws.setflags(write=False)
    return draws


def percentile_interval(lows: FloatArray, highs: FloatArray) -> tuple[float | None, float | None]:
    """The low end of the interval of `lows` and the high end of that of `highs`, [DRAWS] each.

    The two arrays are equal, or they are bounds if a draw gives only bounds. None if any draw has no value (NaN).
    """
    if np.any(np.isnan(lows)) or np.any(np.isnan(highs)):
        return None, None
    beyond = int(DRAWS * (1 - LEVEL) / 2)
    return float(np.sort(lows)[beyond]), float(np.sort(highs)[-1 - beyond])


def mean_of_draws(values: ArrayLike, draws: NDArray[np.intp]) -> FloatArray:
    """Mean over the seeds of each draw: values [seeds, ...] and draws [draws, seeds] give [draws, ...].

    The mean of equal values is exactly that value: rounding never moves a curve that touches its bound beyond it.
    """
    y = np.asarray(values, dtype=float)
    offset = y - y[0]
    total = np.zeros((len(draws), *y.shape[1:]))
    for seed in draws.T:  # Takes a fraction of the memory of offset[draws].
        total += offset[seed]
    mean: FloatArray = y[0] + total / draws.shape[1]
    return mean


def mean_over_seeds(values: ArrayLike) -> FloatArray:
    """Mean of values [seeds, ...], equal to that of `mean_of_draws` to the last digit."""
    y = np.asarray(values, dtype=float)
    mean: FloatArray = mean_of_draws(y, np.arange(len(y))[np.newaxis])[0]
    return mean


def mean_estimate(values: ArrayLike) -> Estimate:
    """Estimate the mean of values [seeds]; unknown if a value is missing (NaN)."""
    y = _by_seed(values)
    if not np.all(np.isfinite(y)):
        return Estimate(None, note="not every seed has a value")
    return estimate_of(lambda draws: mean_of_draws(y, draws), len(y))


def ratio_of_means(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    """Estimate the ratio of two means, both of values [seeds] in the same order of seeds (paired).

    Unknown if a value is missing (NaN) or the denominator's mean is 0. If the denominator of a draw is 0, there is no
    interval. Raises ValueError unless both have the same number of seeds.
    """
    return _of_ratios(_by_seed(numerator), _by_seed(denominator), lambda ratios: ratios)


def geometric_mean_of_ratios(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Estimate the geometric mean over settings of the ratio of means: values [seeds, settings], all at least 0.

    A draw takes the same seeds in all settings. The conditions of `ratio_of_means` apply.
    """

    def geometric_mean(ratios: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):  # A ratio of 0 makes the mean 0.
            mean: FloatArray = np.exp(np.log(ratios).mean(axis=-1))
        return mean

    over, under = (np.asarray(values, dtype=float) for values in (numerators, denominators))
    return _of_ratios(over, under, geometric_mean)


def _of_ratios(over: FloatArray, under: FloatArray, statistic: Callable[[FloatArray], FloatArray]) -> Estimate:
    """Estimate a statistic of the ratios of means over seeds: values [seeds, ...], ratios [draws, ...]."""
    if over.shape != under.shape:
        raise ValueError(f"a paired ratio needs the same seeds on both sides, not {len(over)} and {len(under)}")
    if not np.all(np.isfinite([over, under])):
        return Estimate(None, note="not every seed has a value")
    if np.any(under.mean(axis=0) == 0):
        return Estimate(None, note="the denominator is 0")

    def of_draws(draws: NDArray[np.intp]) -> FloatArray:
        below = mean_of_draws(under, draws)
        return statistic(mean_of_draws(over, draws) / np.where(below == 0, np.nan, below))

    return estimate_of(of_draws, len(over))


def _by_seed(values: ArrayLike) -> FloatArray:
    y = np.asarray(values, dtype=float)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"one value per seed is needed, not an array of shape {y.shape}")
    return y
