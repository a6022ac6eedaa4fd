"""The four files of a run: requests.parquet, iterations.parquet, summary.json, meta.json. All are written, or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.engine import IterationRecord
from fastserve.errors import OutputError
from fastserve.job import RequestMetrics

REQUEST_COLUMNS = {
    "request_id": pa.string(),
    "status": pa.string(),
    "arrival_s": pa.float64(),
    "first_scheduled_s": pa.float64(),
    "first_token_s": pa.float64(),
    "finished_s": pa.float64(),
    "prompt_tokens": pa.int64(),
    "output_tokens": pa.int64(),
    "queueing_s": pa.float64(),
    "swapping_s": pa.float64(),
    "execution_s": pa.float64(),
    "preemptions": pa.int64(),
    "swap_out_bytes": pa.int64(),
    "swap_in_bytes": pa.int64(),
    "recomputed_tokens": pa.int64(),
}
SUMMARIZED = ("jct_s", "normalized_latency_s", "ttft_s", "tpot_s", "max_token_gap_s")
"""Quantities of which a summary gives mean_, p50_, p90_, p95_ and p99_."""
COUNTED = ("preemptions", "swap_out_bytes", "swap_in_bytes", "recomputed_tokens")
"""Columns of which a summary gives the sum over all requests."""
PERCENTILES = (50, 90, 95, 99)


def request_table(metrics: Sequence[RequestMetrics]) -> pa.Table:
    """A row per request, in the order given; times that never came are null."""
    columns = {
        name: pa.array([getattr(row, name) for row in metrics], type_, from_pandas=True)
        for name, type_ in REQUEST_COLUMNS.items()
    }
    return pa.table(columns)


def iteration_table(iterations: Sequence[IterationRecord]) -> pa.Table:
    """A row per computed iteration."""
    columns = zip(*iterations, strict=True) if iterations else ([] for _ in IterationRecord._fields)
    types = (pa.float64() if name.endswith("_s") else pa.int64() for name in IterationRecord._fields)
    return pa.table(
        {
            name: pa.array(column, type_)
            for name, column, type_ in zip(IterationRecord._fields, columns, types, strict=True)
        }
    )


def summarize(metrics: Sequence[RequestMetrics], num_iterations: int) -> dict[str, Any]:
    """The measured part of summary.json: seconds, seconds a token, tokens a second; null where nothing was measured.

    `jct` is arrival to last token; `normalized_latency` is that over the output length; `ttft` is arrival to first
    token; `tpot` is the mean time of the tokens after the first, of requests that have any.
    """
    finished = [row for row in metrics if row.status == "finished"]
    arrival, first, last, output, gap = (
        np.array([getattr(row, name) for row in finished], dtype=float)
        for name in ("arrival_s", "first_token_s", "finished_s", "output_tokens", "max_token_gap_s")
    )
    longer = output > 1
    samples = {
        "jct_s": last - arrival,
        "normalized_latency_s": (last - arrival) / output,
        "ttft_s": first - arrival,
        "tpot_s": (last - first)[longer] / (output[longer] - 1),
        "max_token_gap_s": gap[longer],
    }
    duration = float(last.max() - min(row.arrival_s for row in metrics)) if finished else 0.0
    summary: dict[str, Any] = {
        "finished": len(finished),
        "failed": len(metrics) - len(finished),
        "duration_s": duration,
        "iterations": num_iterations,
        "output_tokens_per_s": float(output.sum()) / duration if duration else None,
    }
    for name in SUMMARIZED:
        values = samples[name]
        summary[f"mean_{name}"] = float(values.mean()) if len(values) else None
        for percentile in PERCENTILES:
            summary[f"p{percentile}_{name}"] = float(np.percentile(values, percentile)) if len(values) else None
    for name in COUNTED:
        summary[name] = sum(getattr(row, name) for row in metrics)
    return summary


class RunFolder:
    """The folder a run writes to. Checked when made, before the work starts; filled by `write`, all files at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path))
        except OSError as error:
            raise OutputError(f"cannot write to output folder {path}: {error.strerror}") from error

    def write(self, requests: pa.Table, iterations: pa.Table, summary: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write the four files beside the old ones, then put them in their places. OutputError if the disk refuses."""
        staging = self._staging
        try:
            pq.write_table(requests, staging / "requests.parquet")
            pq.write_table(iterations, staging / "iterations.parquet")
            (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            (staging / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            for name in ("requests.parquet", "iterations.parquet", "meta.json", "summary.json"):
                os.replace(staging / name, self.path / name)
        except OSError as error:
            raise OutputError(
                f"cannot write the results to {self.path}: {error.strerror}; earlier results there were kept"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
