"""Capacities: the load at which a curve first breaks its objective. Only measured points count; none is extrapolated.

The objective is an upper bound on a latency, which rises with the load, or, with `falling`, a lower bound on a share
that falls, such as SLO attainment (the paper's Figure 13: 95 %).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from harness.analysis.intervals import Estimate, FloatArray, estimate_of, mean_of_draws, percentile_interval, seed_draws

Curves = tuple[ArrayLike, ArrayLike]
"""Rates [rates] and values over them [seeds, rates]."""


def crossings(rates: ArrayLike, values: ArrayLike, bound: float, *, falling: bool = False) -> FloatArray:
    """Rate at which each curve first leaves its bound: values [..., rates] give [...].

    Linear between the two neighbouring points; a value equal to the bound is within it. Later crossings of a curve that
    is not monotone are ignored. The rate is -inf if the first point is beyond the bound: the crossing then lies at an
    unknown lower rate. It is inf if no point is beyond the bound.
    Raises ValueError unless rates rise strictly and every value is a finite number.
    """
    x, y = _curves(rates, values)
    if not len(x):
        return np.full(y.shape[:-1], np.inf)
    if falling:
        y, bound = -y, -bound
    beyond = y > bound
    after = beyond.argmax(axis=-1)
    before = np.maximum(after - 1, 0)
    low, high = (np.take_along_axis(y, i[..., np.newaxis], axis=-1)[..., 0] for i in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):  # Curves without a crossing get no rate below.
        at = np.minimum(x[before] + (bound - low) / (high - low) * (x[after] - x[before]), x[after])
    return np.where(after > 0, at, np.where(beyond[..., 0], -np.inf, np.inf))


def first_upward_crossing(rates: ArrayLike, values: ArrayLike, bound: float) -> float | None:
    """Rate at which the curve `values` [rates] first exceeds `bound`, found by `crossings`; None without a crossing."""
    rate = float(crossings(rates, np.atleast_1d(values), bound))
    return rate if np.isfinite(rate) else None


def capacity_of(
    rates: ArrayLike, values: ArrayLike, bound: float, *, falling: bool = False
) -> tuple[float | None, str]:
    """The rate at which one curve [rates] first leaves its bound; else None, and the reason."""
    estimate = capacity_estimate(rates, np.asarray(values, dtype=float)[np.newaxis], bound, falling=falling)
    return estimate.value, estimate.note


def capacity_estimate(rates: ArrayLike, values: ArrayLike, bound: float, *, falling: bool = False) -> Estimate:
    """Estimate where the mean curve over seeds, of values [seeds, rates], first leaves its bound.

    The interval over seeds holds the crossings of the mean curves of 95 % of the draws. An end is -inf or inf if the
    crossing may lie below the lowest or above the highest rate. The estimate is empty if a value is missing (NaN).
    """
    y = _by_seed(values)
    if not np.all(np.isfinite(y)):
        return Estimate(None, note="at some rate no request finished")
    estimate = estimate_of(lambda draws: crossings(rates, mean_of_draws(y, draws), bound, falling=falling), len(y))
    if estimate.value == np.inf:
        return replace(estimate, value=None, note="within the SLO at every rate")
    if estimate.value == -np.inf:
        side = "below" if falling else "above"
        return replace(estimate, value=None, note=f"{side} the SLO at the lowest rate already")
    return estimate


def ratio_of_capacities(numerator: Curves, denominator: Curves, bound: float, *, falling: bool = False) -> Estimate:
    """Estimate the numerator's capacity over the denominator's; each is (rates, values [seeds, rates]).

    Both must have the same seeds in the same order: a draw takes the same seeds of each (paired). If a draw's capacity
    lies beyond the measured rates, only a bound of its ratio is known: the interval takes the lower bounds for its low
    end (at least 0) and the upper bounds for its high end (inf without one).
    Raises ValueError unless both have the same number of seeds, and rates above 0.
    """
    sides = {"numerator": numerator, "denominator": denominator}
    curves = [(np.asarray(rates, dtype=float), _by_seed(values)) for rates, values in sides.values()]
    num_seeds = len(curves[0][1])
    if len(curves[1][1]) != num_seeds:
        raise ValueError(f"a paired ratio needs the same seeds on both sides, not {num_seeds} and {len(curves[1][1])}")
    if any(np.any(rates <= 0) for rates, _ in curves):
        raise ValueError("a ratio of capacities needs rates above 0")
    of_all = [capacity_estimate(rates, y, bound, falling=falling) for rates, y in curves]
    note = "; ".join(f"{side} {estimate.note}" for side, estimate in zip(sides, of_all, strict=True) if estimate.note)
    over, under = (estimate.value for estimate in of_all)
    value = None if over is None or under is None else over / under
    if any(estimate.low is None for estimate in of_all):
        return Estimate(value, note=note)
    (low, high), (under_low, under_high) = (
        _bounds(rates, crossings(rates, mean_of_draws(y, seed_draws(num_seeds)), bound, falling=falling))
        for rates, y in curves
    )
    with np.errstate(divide="ignore"):
        return Estimate(value, *percentile_interval(low / under_high, high / under_low), note)


def is_monotone(values: ArrayLike) -> bool:
    """Whether no value is below the value before it. False if a value is NaN."""
    y = np.asarray(values, dtype=float)
    return bool(np.all(y[1:] >= y[:-1]))


def largest_fall(values: ArrayLike) -> float:
    """The largest fall of a value below the highest value before it, as a share of that; 0 for a monotone curve."""
    y = np.asarray(values, dtype=float)
    if not len(y):
        return 0.0
    highest = np.maximum.accumulate(y)
    return float(np.max((highest - y) / np.where(highest > 0, highest, 1.0)))


def _bounds(rates: FloatArray, crossing: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lower and upper bounds of the capacity: the crossing twice, or the outermost rate and the end beyond it."""
    low = np.where(crossing == -np.inf, 0.0, np.minimum(crossing, rates[-1]))
    return low, np.maximum(crossing, rates[0])


def _by_seed(values: ArrayLike) -> FloatArray:
    y = np.asarray(values, dtype=float)
    if y.ndim != 2 or not y.size:
        raise ValueError(f"curves need values by seed and rate, not an array of shape {y.shape}")
    return y


def _curves(rates: ArrayLike, values: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, y = np.asarray(rates, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != y.shape[-1:]:
        raise ValueError(f"a curve needs as many rates as values, not shapes {x.shape} and {y.shape}")
    if not (np.all(np.isfinite(x)) and np.all(np.diff(x) > 0)):
        raise ValueError(f"rates must be finite and rise strictly, got {x.tolist()}")
    if not np.all(np.isfinite(y)):
        raise ValueError(f"values must be finite, got {y.tolist()}")
    return x, y
