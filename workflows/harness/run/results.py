"""The four files of a run: requests.parquet, iterations.parquet, summary.json, meta.json."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.core.errors import OutputError
from fastserve.core.files import put_in_place
from fastserve.engine import IterationRecord, RequestMetrics
from harness.run.replaced import replacement_note
from harness.workload.traces.lengths import FloatArray

if TYPE_CHECKING:
    from harness.client.answer import Exchange

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
CLIENT_COLUMNS = {
    "sent_s": pa.float64(),
    "token_s": pa.list_(pa.float64()),
    "event_tokens": pa.list_(pa.int64()),
}
"""Further columns of a run over HTTP: the time at which a request was sent, the time of each event with a token, and
the number of tokens in each of these events (null if the server does not say)."""
SUMMARIZED = ("jct_s", "normalized_latency_s", "ttft_s", "tpot_s", "max_token_gap_s")
"""Quantities for which a summary has the keys mean_, p50_, p90_, p95_ and p99_."""
COUNTED = ("preemptions", "swap_out_bytes", "swap_in_bytes", "recomputed_tokens")
"""Columns for which a summary has the sum over all requests."""
PERCENTILES = (50, 90, 95, 99)
MISSING = 0.05
"""If a larger share of the requests lacks a quantity, its summary is null: it would not describe all requests."""
_LATE_S = 0.01


def request_table(
    metrics: Sequence[RequestMetrics | Exchange], columns: Mapping[str, pa.DataType] = REQUEST_COLUMNS
) -> pa.Table:
    """Make a row per request, in the order given. Times that do not exist, and values a client cannot see, are null."""
    return pa.table(
        {
            name: pa.array([getattr(row, name) for row in metrics], type_, from_pandas=True)
            for name, type_ in columns.items()
        }
    )


def iteration_table(iterations: Sequence[IterationRecord]) -> pa.Table:
    """Make a row per computed iteration."""
    columns = zip(*iterations, strict=True) if iterations else ([] for _ in IterationRecord._fields)
    types = (pa.float64() if name.endswith("_s") else pa.int64() for name in IterationRecord._fields)
    return pa.table(
        {
            name: pa.array(column, type_)
            for name, column, type_ in zip(IterationRecord._fields, columns, types, strict=True)
        }
    )


@np.errstate(divide="ignore", invalid="ignore")  # The results are null.
def summarize(metrics: Sequence[RequestMetrics | Exchange], counted: Mapping[str, int | None]) -> dict[str, Any]:
    """Make the measured part of summary.json, in seconds, seconds a token and tokens/s; unmeasured keys are null.

    `counted` holds the counts over the whole run: `iterations` and COUNTED.

    `jct` is arrival to last token; `normalized_latency` is that over the output length; `ttft` is arrival to first
    token; `tpot` is the mean time of the tokens after the first, for requests with several tokens. A quantity that more
    than MISSING of the requests lack is null.
    """
    finished = [row for row in metrics if row.status == "finished"]
    arrival, first, last, output, per_token, gap = (
        np.array([getattr(row, name) for row in finished], dtype=float)
        for name in ("arrival_s", "first_token_s", "finished_s", "output_tokens", "tpot_s", "max_token_gap_s")
    )
    longer = output > 1
    samples = {
        "jct_s": last - arrival,
        "normalized_latency_s": (last - arrival) / output,
        "ttft_s": first - arrival,
        "tpot_s": per_token[longer],
        "max_token_gap_s": gap[longer],
    }
    duration = float(last.max() - min(row.arrival_s for row in metrics)) if finished else 0.0
    summary: dict[str, Any] = {
        "finished": len(finished),
        "failed": len(metrics) - len(finished),
        "duration_s": duration,
        "iterations": counted["iterations"],
        "output_tokens_per_s": float(output.sum()) / duration if duration else None,
    }
    for name in SUMMARIZED:
        values = _known(samples[name])
        summary[f"mean_{name}"] = float(values.mean()) if len(values) else None
        for percentile in PERCENTILES:
            summary[f"p{percentile}_{name}"] = float(np.percentile(values, percentile)) if len(values) else None
    summary |= {name: counted[name] for name in COUNTED}
    return {name: value if _is_finite(value) else None for name, value in summary.items()}


def _known(values: FloatArray) -> FloatArray:
    """The values that are not NaN; none if too many are NaN."""
    known = values[~np.isnan(values)]
    return known if len(values) - len(known) <= MISSING * len(values) else known[:0]


def count(metrics: Sequence[RequestMetrics], num_iterations: int) -> dict[str, int | None]:
    """Count what `summarize` takes as `counted`, over all requests."""
    return {"iterations": num_iterations} | {name: sum(getattr(row, name) for row in metrics) for name in COUNTED}


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


class RunFolder:
    """The folder of a run. Making it checks that it can be written; `write` puts all files into it, or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path))
        except OSError as error:
            raise OutputError(f"cannot write to output folder {path}: {error.strerror}") from error

    def write(self, requests: pa.Table, iterations: pa.Table, summary: dict[str, Any], meta: dict[str, Any]) -> str:
        """Write the four files beside the old ones, then replace these. Raises OutputError if that fails.

        Returns a note if the old files were of another configuration, else an empty text.
        """
        staging = self._staging
        meta = _with_finite_numbers(meta)
        note = replacement_note(self.path / "meta.json", meta, "configuration")
        try:
            pq.write_table(requests, staging / "requests.parquet")
            pq.write_table(iterations, staging / "iterations.parquet")
            (staging / "meta.json").write_text(_json(meta), encoding="utf-8")
            (staging / "summary.json").write_text(_json(summary), encoding="utf-8")
            for name in ("requests.parquet", "iterations.parquet", "meta.json", "summary.json"):
                put_in_place(staging / name, self.path / name)
        except OSError as error:
            raise OutputError(
                f"cannot write the results to {self.path}: {error.strerror}; earlier results there were kept"
            ) from error
        return note

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _with_finite_numbers(content: Any) -> Any:
    """Turn infinite options into text, as they would be given: JSON has no infinity."""
    if isinstance(content, dict):
        return {key: _with_finite_numbers(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_finite_numbers(value) for value in content]
    return content if _is_finite(content) else str(content)


def _is_finite(value: object) -> bool:
    """Whether the value is not an infinite number or NaN."""
    return not isinstance(value, float) or math.isfinite(value)
