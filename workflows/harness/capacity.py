"""At which load a curve first breaks its objective. Pure functions of measured points: nothing is extrapolated."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def first_upward_crossing(rates: ArrayLike, values: ArrayLike, bound: float) -> float | None:
    """Rate at which `values` first exceeds `bound`, coming from a point that does not; None if it never does.

    Linear between the two neighbouring points. Later crossings of a curve that is not monotone are ignored. None as
    well if the first point is above the bound already: the crossing then lies at some lower rate, nobody knows which.
    Raises ValueError unless rates rise strictly and every value is a finite number.
    """
    x, y = _curve(rates, values)
    above = np.flatnonzero(y > bound)
    if not len(above) or above[0] == 0:
        return None
    i = above[0]
    share = (bound - y[i - 1]) / (y[i] - y[i - 1])
    return float(min(x[i - 1] + share * (x[i] - x[i - 1]), x[i]))


def is_monotone(values: ArrayLike) -> bool:
    """Whether no value is below the one before it. NaN is not monotone with anything."""
    y = np.asarray(values, dtype=float)
    return bool(np.all(y[1:] >= y[:-1]))


def largest_fall(values: ArrayLike) -> float:
    """How far values fall below the highest one before them, at most, as a share of it; 0 for a monotone curve."""
    y = np.asarray(values, dtype=float)
    if not len(y):
        return 0.0
    highest = np.maximum.accumulate(y)
    return float(np.max((highest - y) / np.where(highest > 0, highest, 1.0)))


def _curve(rates: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(rates, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a curve needs as many rates as values, not shapes {x.shape} and {y.shape}")
    if not (np.all(np.isfinite(x)) and np.all(np.diff(x) > 0)):
        raise ValueError(f"rates must be finite and rise strictly, got {x.tolist()}")
    if not np.all(np.isfinite(y)):
        raise ValueError(f"values must be finite, got {y.tolist()}")
    return x, y
