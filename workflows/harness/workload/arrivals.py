"""Arrival processes: `--arrivals poisson | gamma:cv=4 | constant | trace`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.options import parse_options

Kind = Literal["poisson", "gamma", "constant", "trace"]
AT_ONCE = 1e6
"""A rate, in requests/s, at which all requests of a workload arrive together."""


@dataclass(frozen=True)
class Arrivals:
    """An arrival process; `cv`, the coefficient of variation of the gaps, applies to `gamma` only."""

    kind: Kind
    cv: float | None = None

    def __str__(self) -> str:
        return self.kind if self.cv is None else f"{self.kind}:cv={self.cv:g}"

    def arrival_times(
        self,
        n: int,
        rate: float | None,
        rng: np.random.Generator,
        timestamps: NDArray[np.float64] | None = None,
        trace: str = "the trace",
    ) -> NDArray[np.float64]:
        """Draw `n` absolute arrival times in seconds, never decreasing, at `rate` requests/s on average.

        Random gaps are drawn at rate 1 and then scaled, so one seed gives one pattern at every rate, and a longer
        workload begins with the shorter one. The first arrival comes after the first gap. With `trace`, it comes at 0,
        `timestamps` (seconds) are the trace's own, and a rate of None keeps their pace.
        Raises ConfigError for a rate that is not finite and positive, TraceError if `trace` has too few timestamps.
        """
        if n < 1:
            raise ConfigError(f"the number of requests must be at least 1, not {n}")
        if rate is not None or self.kind != "trace":
            _check_rate(self.kind, rate)
        if self.kind == "trace":
            return _replay(n, rate, timestamps, trace)
        assert rate is not None
        if self.kind == "constant":
            return np.arange(1, n + 1) / rate
        if self.kind == "poisson":
            gaps = rng.standard_exponential(n)
        else:
            assert self.cv is not None
            gaps = rng.standard_gamma(self.cv**-2, n) * self.cv**2
        return np.cumsum(gaps) / rate


def parse_arrivals(spec: str) -> Arrivals:
    """Read an `--arrivals` value. Raises ConfigError, naming the valid values, if it is unknown."""
    kind, _, options = spec.strip().partition(":")
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown arrivals {spec!r}; valid: poisson, gamma:cv=4, constant, trace")
    if kind != "gamma":
        parse_options(f"arrivals {spec!r}", options, {})
        return Arrivals(cast(Kind, kind))
    cv = parse_options(f"arrivals {spec!r}", options, {"cv": 0.0})["cv"]
    # Outside this range, floating point cannot sample the gamma's shape, cv^-2.
    if not 1e-3 <= cv <= 100:
        raise ConfigError(f"arrivals {spec!r}: give cv between 0.001 and 100, as in gamma:cv=4")
    return Arrivals("gamma", cv)


def _check_rate(kind: Kind, rate: float | None) -> None:
    if rate is None:
        raise ConfigError(f"{kind} arrivals need a rate in requests/s; only trace arrivals can go without")
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"the rate must be finite and above 0 requests/s, not {rate}")


def _replay(n: int, rate: float | None, timestamps: NDArray[np.float64] | None, trace: str) -> NDArray[np.float64]:
    if timestamps is None:
        raise TraceError(
            f"{trace} has no timestamps, so its arrivals cannot be replayed; use poisson, gamma or constant"
        )
    if len(timestamps) < n:
        raise TraceError(f"{trace} holds {len(timestamps)} requests, fewer than the {n} asked for in trace order")
    times = timestamps[:n] - timestamps[0]
    if rate is None or n == 1:
        return times
    if times[-1] == 0:
        raise TraceError(f"{trace}: its first {n} requests arrive at one instant, so no scaling gives rate {rate}")
    return times * ((n - 1) / rate / times[-1])
