"""95 % intervals over seeds: the jackknife-t on logs (Miller 1974), and the interval of one further sample.

A seed is one set of requests, the same for every policy and every rate. A statistic is computed of all seeds, of all
but one (the jackknife), and of each alone (a sample of the paper's size). Both sides of a comparison take the same
seeds: it is paired. The interval is the statistic's log plus or minus t times the jackknife's standard error; t has a
degree of freedom less than there are seeds. docs/verdicts.md says how often such intervals hold the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Selections = NDArray[np.intp]
"""Selections of seeds [selections, seeds]."""
Bounds = tuple[FloatArray, FloatArray]
"""Lower and upper bounds of a statistic, equal where it is known; -inf and inf where there is none."""
Statistic = Callable[[Selections], Bounds]
"""Maps selections to the bounds of each one's statistic in each setting [selections, settings]."""
LEVEL = 0.95
LEAST_SEEDS = 3
"""Fewer give no interval: with two, t is 12.7, and an interval of a latency would span orders of magnitude."""
ON_PLAIN_SCALE = "the interval is on the plain scale, since a value is not above 0"
_DOWN_AND_UP = np.array([[-1.0], [1.0]])


@dataclass(frozen=True)
class Estimate:
    """A value over all seeds and its interval. An unknown value or end is None, and `note` gives the reason.

    An end of -inf or inf is open: it lies beyond the measured range. Fewer than three seeds give no interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    sample_low: float | None = None
    """Low end of the 95 % prediction interval: where the same statistic of one further seed lies."""
    sample_high: float | None = None
    p_value: float | None = None
    """Two-sided, of the value being 1: of no difference, if it is a ratio."""


def estimate_of(statistic: Statistic, num_seeds: int, *, on_logs: bool = True) -> Estimate:
    """Estimate the largest of a statistic over its settings; most statistics have one.

    `on_logs` is for statistics that are above 0; if a value is not, the note says that no logs were taken.

    The largest of several tends to be too large, never too small. So with several settings the low end, the largest
    low end, holds for all of them at once (Šidák's t). The high end is that of one: the largest high end is above the
    truth whenever that of the truly largest setting is. An end is open if the statistic of all seeds, or of all but
    one, has no bound on that side; an end for a sample, if that of one seed has none.
    """
    all_seeds = np.arange(num_seeds)
    whole = np.array(statistic(all_seeds[np.newaxis]))[:, 0]
    least, most = whole.max(axis=1)
    value = float(least) if least == most else None
    if num_seeds < LEAST_SEEDS:
        return Estimate(value)
    left_out = np.array(statistic(leave_one_out(num_seeds)))
    samples = np.array(statistic(all_seeds[:, np.newaxis])).max(axis=2)
    are_positive = all(map(_are_positive, (whole, left_out, samples)))
    low, high, p_value = _jackknife_t(whole, left_out, on_logs and are_positive)
    sample_low, sample_high = _prediction(samples, on_logs and are_positive)
    note = ON_PLAIN_SCALE if on_logs and not are_positive else ""
    return Estimate(value, low, high, note, sample_low, sample_high, p_value)


def known(values: FloatArray) -> Bounds:
    """The bounds of a statistic that is always known: values [selections], or [selections, settings]."""
    of_settings = values.reshape(len(values), -1)
    return of_settings, of_settings


@cache
def leave_one_out(num_seeds: int) -> Selections:
    """All seeds but one [num_seeds, num_seeds - 1]."""
    selections = np.array([np.delete(np.arange(num_seeds), seed) for seed in range(num_seeds)])
    selections.setflags(write=False)
    return selections


def t_quantile(num_seeds: int, num_settings: int = 1) -> float:
    """Student's t that the largest of `num_settings` independent ones exceeds with half the probability 1 - LEVEL."""
    from scipy.special import stdtrit  # Slow to import, and a run needs no intervals.

    return float(stdtrit(num_seeds - 1, ((1 + LEVEL) / 2) ** (1 / num_settings)))


def _jackknife_t(
    whole: FloatArray, left_out: FloatArray, on_logs: bool
) -> tuple[float | None, float | None, float | None]:
    """The interval of the largest setting, and the p-value of its being 1.

    Takes lower and upper bounds: of all seeds [2, settings], and of all but one [2, seeds, settings].
    """
    if np.isnan(whole).any() or np.isnan(left_out).any():
        return None, None, None
    num_seeds, num_settings = left_out.shape[1:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.log(left_out) if on_logs else left_out
        from_first = scaled - scaled[:, :1]  # So that equal values have an error of exactly 0.
        error = np.sqrt((num_seeds - 1) * from_first.var(axis=1))
        error[~np.isfinite(left_out).all(axis=1)] = np.inf
        t = np.array([[t_quantile(num_seeds, num_settings)], [t_quantile(num_seeds)]])
        away = _DOWN_AND_UP * t * error
        ends = whole * np.exp(away) if on_logs else whole + away
        low, high = np.where(np.isinf(error) | np.isinf(whole), _DOWN_AND_UP * np.inf, ends).max(axis=1)
        distance = np.log(whole) if on_logs else whole - 1
        above, below = np.where(distance == 0, 0, distance / error).max(axis=1)
    return float(low), float(high), _p_value(above, below, num_seeds, num_settings)


def _p_value(above: float, below: float, num_seeds: int, num_settings: int) -> float:
    """Twice the smaller of two: that the largest t exceeds `above`, and that one setting's t is less than `below`."""
    from scipy.special import stdtr  # Slow to import, and a run needs no intervals.

    # Of -above, not of above, so that small ones keep their digits.
    with np.errstate(divide="ignore"):
        is_gain = -np.expm1(num_settings * np.log1p(-stdtr(num_seeds - 1, -above)))
    return float(min(1, 2 * is_gain, 2 * stdtr(num_seeds - 1, below)))


def _prediction(samples: FloatArray, on_logs: bool) -> tuple[float | None, float | None]:
    """The prediction interval of one further sample, of lower and upper bounds by seed [2, seeds]."""
    if np.isnan(samples).any():
        return None, None
    num_seeds = samples.shape[1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.log(samples) if on_logs else samples
        first = scaled[:, :1]
        mean = first + (scaled - first).mean(axis=1, keepdims=True)
        spread = (scaled - first).std(axis=1, keepdims=True, ddof=1) * np.sqrt(1 + 1 / num_seeds)
        ends = mean + _DOWN_AND_UP * t_quantile(num_seeds) * spread
        is_open = ~np.isfinite(samples).all(axis=1, keepdims=True)
        low, high = np.where(is_open, _DOWN_AND_UP * np.inf, np.exp(ends) if on_logs else ends)[:, 0]
    return float(low), float(high)


def _are_positive(values: FloatArray) -> bool:
    """Whether logs can be taken of all values; an infinite one stands for the lack of a bound, NaN of a value."""
    return not bool((np.isfinite(values) & (values <= 0)).any())


def means_of(values: ArrayLike, selections: Selections) -> FloatArray:
    """Mean over the seeds of each selection: values [seeds, ...] and [selections, seeds] give [selections, ...].

    The mean of equal values is exactly that value: rounding never moves a curve that touches its bound beyond it.
    """
    y = np.asarray(values, dtype=float)
    offset = y - y[0]
    total = np.zeros((len(selections), *y.shape[1:]))
    for seed in selections.T:  # Takes a fraction of the memory of offset[selections].
        total += offset[seed]
    mean: FloatArray = y[0] + total / selections.shape[1]
    return mean


def mean_over_seeds(values: ArrayLike) -> FloatArray:
    """Mean of values [seeds, ...], equal to that of `means_of` to the last digit."""
    y = np.asarray(values, dtype=float)
    mean: FloatArray = means_of(y, np.arange(len(y))[np.newaxis])[0]
    return mean


def mean_estimate(values: ArrayLike) -> Estimate:
    """Estimate the mean of values [seeds]; unknown if a value is missing (NaN)."""
    y = _by_seed(values)
    if not np.all(np.isfinite(y)):
        return Estimate(None, note="not every seed has a value")
    return estimate_of(lambda selections: known(means_of(y, selections)), len(y))


def ratio_of_means(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    """Estimate the ratio of two means, both of values [seeds] in the same order of seeds (paired).

    Unknown if a value is missing (NaN) or the denominator's mean is 0. If the denominator of a selection is 0, there is
    no interval. Raises ValueError unless both have the same number of seeds.
    """
    return _of_ratios(_by_seed(numerator), _by_seed(denominator), lambda ratios: ratios)


def largest_ratio_of_means(numerators: ArrayLike, denominators: ArrayLike, *, on_logs: bool = True) -> Estimate:
    """Estimate the largest of the ratios of means over settings: values [seeds, settings], paired.

    The interval holds the largest true ratio, whichever setting has it. A sample's is the largest of its own ratios.
    Where ratios may come near 0, as shares do, logs are not for them. The conditions of `ratio_of_means` apply.
    """
    over, under = (np.asarray(values, dtype=float) for values in (numerators, denominators))
    return _of_ratios(over, under, lambda ratios: ratios, on_logs=on_logs)


def geometric_mean_of_ratios(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Estimate the geometric mean over settings of the ratio of means: values [seeds, settings], all at least 0.

    A selection takes the same seeds in all settings. The conditions of `ratio_of_means` apply.
    """

    def geometric_mean(ratios: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):  # A ratio of 0 makes the mean 0.
            mean: FloatArray = np.exp(np.log(ratios).mean(axis=-1))
        return mean

    over, under = (np.asarray(values, dtype=float) for values in (numerators, denominators))
    return _of_ratios(over, under, geometric_mean)


def _of_ratios(
    over: FloatArray, under: FloatArray, statistic: Callable[[FloatArray], FloatArray], *, on_logs: bool = True
) -> Estimate:
    """Estimate a statistic of the ratios of means over seeds: values [seeds, ...], ratios [selections, ...]."""
    if over.shape != under.shape:
        raise ValueError(f"a paired ratio needs the same seeds on both sides, not {len(over)} and {len(under)}")
    if not over.size or not np.all(np.isfinite([over, under])):
        return Estimate(None, note="not every seed has a value")
    if np.any(under.mean(axis=0) == 0):
        return Estimate(None, note="the denominator is 0")

    def of_selections(selections: Selections) -> Bounds:
        below = means_of(under, selections)
        return known(statistic(means_of(over, selections) / np.where(below == 0, np.nan, below)))

    return estimate_of(of_selections, len(over), on_logs=on_logs)


def _by_seed(values: ArrayLike) -> FloatArray:
    y = np.asarray(values, dtype=float)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"one value per seed is needed, not an array of shape {y.shape}")
    return y
