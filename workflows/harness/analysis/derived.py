"""Metrics of a run's requests for the tables of experiments, beyond those of summary.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from fastserve.latency import LatencyModel, decode_times

SLO_TTFT_S, SLO_NORMALIZED_S = 3.1, 0.3
SLO_SCALES = (0.5, 1, 2)
"""The paper's bounds on time to first token and normalized latency (figure 13), at half, once and twice."""
NUM_DECILES = 10
SETTLED = 500
"""Finished requests after which a policy that learns from them counts as having learned."""


def derived_metrics(rows: pa.Table, latency: LatencyModel | None) -> dict[str, float | None]:
    """Compute parts of the completion time (s), slowdowns and SLO attainment from a run's requests.parquet.

    Slowdown is the completion time over the time that the request would take alone; it needs the latency model and is
    None without it. Deciles are of the output length, the shortest first. Attainment is a share of all requests; a
    failed request misses its SLO.

    A policy that learns from finished requests knows none when a run begins. The metrics called settled, the same for
    every policy, show it after learning: they cover the `settled_requests` that arrived after `SETTLED` requests had
    finished, and that finished themselves.
    """
    columns = {name: np.array(values) for name, values in rows.to_pydict().items()}
    finished = columns["status"] == "finished"
    total = len(finished)
    requests = {name: values[finished] for name, values in columns.items()}
    arrival, first, last = (requests[name].astype(float) for name in ("arrival_s", "first_token_s", "finished_s"))
    jct, output = last - arrival, requests["output_tokens"]
    metrics: dict[str, float | None] = {}
    for part in ("queueing_s", "swapping_s", "execution_s"):
        metrics[f"mean_{part}"] = _or_none(requests[part].astype(float), np.mean)
    for scale in SLO_SCALES:
        within = (first - arrival < scale * SLO_TTFT_S) & (jct / output < scale * SLO_NORMALIZED_S)
        metrics[f"slo_attainment_{scale:g}"] = float(within.sum() / total)
    slowdown = np.array([])
    if latency is not None and len(jct):
        slowdown = jct / times_alone(latency, requests["prompt_tokens"], output)
    metrics["mean_slowdown"] = _or_none(slowdown, np.mean)
    metrics["p50_slowdown"] = _or_none(slowdown, np.median)
    metrics["p99_slowdown"] = _or_none(slowdown, lambda values: np.percentile(values, 99))
    metrics["max_slowdown"] = _or_none(slowdown, np.max)
    by_length = np.argsort(output, kind="stable") if len(slowdown) else np.array([], dtype=int)
    for i, tenth in enumerate(np.array_split(by_length, NUM_DECILES), 1):
        metrics[f"slowdown_decile_{i}"] = _or_none(slowdown[tenth], np.mean)
    settled = arrival > np.sort(last)[SETTLED - 1] if len(last) >= SETTLED else np.zeros(len(last), dtype=bool)
    normalized, slowdown = (jct / output)[settled], slowdown[settled] if len(slowdown) else slowdown
    metrics["settled_requests"] = int(settled.sum())
    metrics["mean_normalized_latency_settled_s"] = _or_none(normalized, np.mean)
    metrics["p95_normalized_latency_settled_s"] = _or_none(normalized, lambda values: np.percentile(values, 95))
    metrics["mean_jct_settled_s"] = _or_none(jct[settled], np.mean)
    metrics["p99_slowdown_settled"] = _or_none(slowdown, lambda values: np.percentile(values, 99))
    metrics["max_slowdown_settled"] = _or_none(slowdown, np.max)
    return metrics


def times_alone(latency: LatencyModel, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
    """Seconds that each request would take on an idle machine [requests]: its prompt, then one token an iteration."""
    longest = int((prompt_tokens + output_tokens).max())
    # decoded[n] is the time of decoding with contexts of 1 to n tokens.
    decoded = np.concatenate(([0.0], np.cumsum(decode_times(latency, [1], longest))))
    prefill = {int(length): latency.iteration_time((int(length),), ()) for length in set(prompt_tokens.tolist())}
    return np.array(
        [
            prefill[prompt] + decoded[prompt + output - 1] - decoded[prompt]
            for prompt, output in zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
        ]
    )


def _or_none(values: np.ndarray, statistic: Any) -> float | None:
    return float(statistic(values)) if len(values) else None
