"""The measured part of summary.json, made from the rows of requests.parquet as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.engine import RequestMetrics
from harness.workload.traces.lengths import FloatArray

if TYPE_CHECKING:
    from harness.client.answer import Exchange

SUMMARIZED = ("jct_s", "normalized_latency_s", "latency_per_total_token_s", "ttft_s", "tpot_s", "max_token_gap_s")
"""Quantities for which a summary has the keys mean_, p50_, p90_, p95_ and p99_."""
_COLUMNS = (
    "arrival_s",
    "first_token_s",
    "finished_s",
    "prompt_tokens",
    "output_tokens",
    "tpot_s",
    "max_token_gap_s",
)
COUNTED = {
    "preemptions": "preemptions",
    "swap_out_bytes": "swap_out_bytes",
    "swap_in_bytes": "swap_in_bytes",
    "recomputed_tokens": "recomputed_tokens",
    "cached_prompt_tokens": "cached_tokens",
}
"""Keys of a summary that hold a column's sum over all requests, and the column."""
PERCENTILES = (50, 90, 95, 99)
MISSING = 0.05
"""If a larger share of the requests lacks a quantity, its summary is null: it would not describe all requests."""
_LATE_S = 0.01


class Summary:
    """The measured part of summary.json, in seconds, seconds a token and tokens/s; unmeasured keys are null.

    `jct` is arrival to last token; `normalized_latency` is that over the output length, `latency_per_total_token` over
    prompt and output; `ttft` is arrival to first token; `tpot` is the mean time of the tokens after the first, for
    requests with several tokens. A quantity that more than MISSING of the requests lack is null.

    Keeps 48 bytes of each finished request: percentiles are exact, so that they need every value.
    """

    def __init__(self) -> None:
        self._samples: dict[str, list[FloatArray]] = {name: [] for name in SUMMARIZED}
        self._num_requests = 0
        self._num_finished = 0
        self._output_tokens = 0
        self._first_arrival_s = math.inf
        self._last_token_s: float | np.floating[Any] = -math.inf

    @np.errstate(divide="ignore", invalid="ignore")  # The results are null.
    def add(self, rows: Sequence[RequestMetrics | Exchange]) -> None:
        """Take the next rows."""
        self._num_requests += len(rows)
        self._first_arrival_s = min(self._first_arrival_s, min((row.arrival_s for row in rows), default=math.inf))
        finished = [row for row in rows if row.status == "finished"]
        if not finished:
            return
        arrival, first, last, prompt, output, per_token, gap = (
            np.array([getattr(row, name) for row in finished], dtype=float) for name in _COLUMNS
        )
        self._num_finished += len(finished)
        self._output_tokens += int(output.sum())
        self._last_token_s = np.maximum(self._last_token_s, last.max())
        longer = output > 1
        jct = last - arrival
        samples = (jct, jct / output, jct / (prompt + output), first - arrival, per_token[longer], gap[longer])
        for name, values in zip(SUMMARIZED, samples, strict=True):
            self._samples[name].append(values)

    @np.errstate(invalid="ignore")  # Between infinite values.
    def result(self, counted: Mapping[str, int | None]) -> dict[str, Any]:
        """Make the summary. `counted` holds the counts over the whole run: `iterations` and COUNTED."""
        duration = float(self._last_token_s - self._first_arrival_s) if self._num_finished else 0.0
        summary: dict[str, Any] = {
            "finished": self._num_finished,
            "failed": self._num_requests - self._num_finished,
            "duration_s": duration,
            "iterations": counted["iterations"],
            "output_tokens_per_s": float(self._output_tokens) / duration if duration else None,
        }
        for name in SUMMARIZED:
            values = _known(np.concatenate([np.empty(0), *self._samples[name]]))
            found = np.percentile(values, PERCENTILES).tolist() if len(values) else [None] * len(PERCENTILES)
            summary[f"mean_{name}"] = float(values.mean()) if len(values) else None
            summary |= {f"p{percentile}_{name}": value for percentile, value in zip(PERCENTILES, found, strict=True)}
        summary |= {name: counted[name] for name in COUNTED}
        return {name: value if is_finite(value) else None for name, value in summary.items()}


def _known(values: FloatArray) -> FloatArray:
    """The values that are not NaN; none if too many are NaN."""
    known = values[~np.isnan(values)]
    return known if len(values) - len(known) <= MISSING * len(values) else known[:0]


def summarize_lateness(lateness_s: FloatArray) -> dict[str, float | None]:
    """Keys of the summary of a run over HTTP: delays between due time and sending of requests, in seconds."""
    return {
        "p99_send_lateness_s": float(np.percentile(lateness_s, 99)) if len(lateness_s) else None,
        "max_send_lateness_s": float(lateness_s.max()) if len(lateness_s) else None,
    }


def why_late(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Warn if a run sent requests so late that it affects the latencies; else empty."""
    p99, longest = (
        max((summary.get(f"{statistic}_send_lateness_s") or 0.0 for summary in summaries), default=0.0)
        for statistic in ("p99", "max")
    )
    if p99 <= _LATE_S:
        return ""
    return (
        f"requests were sent up to {longest:.3g} s late (P99 {p99:.3g} s), which is part of their latencies: the "
        "client, or the connection to the server, did not keep the schedule"
    )


def is_finite(value: object) -> bool:
    """Whether the value is not an infinite number or NaN."""
    return not isinstance(value, float) or math.isfinite(value)
