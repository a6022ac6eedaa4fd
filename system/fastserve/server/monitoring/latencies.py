"""Latencies of the last minute, for the live page."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TypedDict

from fastserve.core.request import RequestStatus
from fastserve.engine import Job

_SPAN_S = 60.0
_MAX_VALUES = 20_000
"""Values kept of each latency; of a minute with more, the latest count."""


class Summary(TypedDict):
    """Figures of one latency, in seconds; None if there are no values."""

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Latencies:
    """Latencies with the times at which they ended. For the engine's thread only; what `copy` returns, for any."""

    def __init__(self) -> None:
        self._values: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=_MAX_VALUES) for name in ("ttft_s", "tpot_s", "jct_s")
        }
        """Time to first token, time per output token after it, job completion time: each with the time of its end."""

    def first_token(self, job: Job, at_s: float) -> None:
        """Record a job's first token."""
        self._values["ttft_s"].append((at_s, at_s - job.request.arrival_s))

    def done(self, job: Job) -> None:
        """Record a job that has left the engine."""
        end_s, first_s, request = job.finished_s, job.first_token_s, job.request
        if request.status is not RequestStatus.FINISHED or end_s is None or first_s is None:
            return
        self._values["jct_s"].append((end_s, end_s - request.arrival_s))
        if request.num_output_tokens > 1 and job.last_token_s is not None:
            per_token_s = (job.last_token_s - first_s) / (request.num_output_tokens - 1)
            self._values["tpot_s"].append((end_s, per_token_s))

    def copy(self, now_s: float) -> dict[str, list[float]]:
        """Return the values of the minute before `now_s`, by name."""
        for values in self._values.values():
            while values and values[0][0] < now_s - _SPAN_S:
                values.popleft()
        return {name: [value for _, value in values] for name, values in self._values.items()}


def summarize(values: Sequence[float]) -> Summary:
    """Return the mean and percentiles, by nearest rank."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    ordered = sorted(values)
    p50, p95, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.50, 0.95, 0.99))
    return {"count": len(ordered), "mean": sum(ordered) / len(ordered), "p50": p50, "p95": p95, "p99": p99}
