"""Capacities: the load at which a curve first breaks its objective. Only measured points count; none is extrapolated.

The objective is an upper bound on a latency, which rises with the load, or, with `falling`, a lower bound on a share
that falls, such as SLO attainment (the paper's Figure 13: 95 %).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from harness.analysis.intervals import Bounds, Estimate, FloatArray, Selections, estimate_of, mean_over_seeds, means_of

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

    An end of the interval is open, -inf or inf, if the mean curve of all seeds, or of all but one, does not cross on
    that side; both are if none of them crosses. The estimate is empty if a value is missing (NaN).
    """
    x, y = np.asarray(rates, dtype=float), _by_seed(values)
    if not np.all(np.isfinite(y)):
        return Estimate(None, note="at some rate no request finished")
    estimate = _beyond(x, estimate_of(lambda selections: _bounds(x, y, bound, falling, selections), len(y)))
    over_all = crossings(x, mean_over_seeds(y), bound, falling=falling)
    if over_all == np.inf:
        return replace(estimate, note="within the SLO at every rate")
    if over_all == -np.inf:
        side = "below" if falling else "above"
        return replace(estimate, note=f"{side} the SLO at the lowest rate already")
    return estimate


def ratio_of_capacities(numerator: Curves, denominator: Curves, bound: float, *, falling: bool = False) -> Estimate:
    """Estimate the numerator's capacity over the denominator's; each is (rates, values [seeds, rates]).

    Both must have the same seeds in the same order (paired). If a capacity lies beyond the measured rates, only a bound
    of the ratio is known: the interval takes the lower bounds for its low end (at least 0) and the upper bounds for its
    high end (inf without one).
    Raises ValueError unless both have the same number of seeds, and rates above 0.
    """
    sides = {"numerator": numerator, "denominator": denominator}
    curves = [(np.asarray(rates, dtype=float), _by_seed(values)) for rates, values in sides.values()]
    num_seeds = len(curves[0][1])
    if len(curves[1][1]) != num_seeds:
        raise ValueError(f"a paired ratio needs the same seeds on both sides, not {num_seeds} and {len(curves[1][1])}")
    if any(np.any(rates <= 0) for rates, _ in curves):
        raise ValueError("a ratio of capacities needs rates above 0")
    each = [capacity_of(x, mean_over_seeds(y), bound, falling=falling) for x, y in curves]
    note = "; ".join(f"{side} {reason}" for side, (_, reason) in zip(sides, each, strict=True) if reason)
    if not all(np.all(np.isfinite(y)) for _, y in curves):
        return Estimate(None, note=note)

    def ratios(selections: Selections) -> Bounds:
        (low, high), (under_low, under_high) = (_bounds(x, y, bound, falling, selections) for x, y in curves)
        with np.errstate(invalid="ignore"):
            at_least = np.where(np.isinf(low) | np.isinf(under_high), -np.inf, low / under_high)
            at_most = np.where(np.isinf(high) | np.isinf(under_low), np.inf, high / under_low)
        return at_least, at_most

    estimate = estimate_of(ratios, num_seeds)
    ends = {name: getattr(estimate, name) for name in ("low", "sample_low")}
    at_least_0 = {name: max(end, 0.0) for name, end in ends.items() if end is not None}
    return replace(estimate, **at_least_0, note="; ".join(filter(None, (note, estimate.note))))


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


def _bounds(x: FloatArray, y: FloatArray, bound: float, falling: bool, selections: Selections) -> Bounds:
    """The crossing of each selection's mean curve, [selections, 1] twice; else the outermost rate, and infinity."""
    at = crossings(x, means_of(y, selections), bound, falling=falling)[:, np.newaxis]
    return np.minimum(at, x[-1]), np.maximum(at, x[0])


def _beyond(x: FloatArray, estimate: Estimate) -> Estimate:
    """Mark an interval that lies beyond the measured rates as a whole, so that both of its ends are infinite."""
    if estimate.low == x[-1] and estimate.high == np.inf:
        return replace(estimate, low=np.inf)
    if estimate.high == x[0] and estimate.low == -np.inf:
        return replace(estimate, high=-np.inf)
    return estimate


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
