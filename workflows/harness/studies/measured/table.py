"""The table of a measured run: the times of every request, in seconds from the first arrival."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError
from harness.workload.traces.measured import MeasuredRun

COLUMNS = ("request", "arrival_s", "scheduled_s", "first_token_s", "finished_s", "prompt_tokens", "output_tokens")
_TIMES = [name for name in COLUMNS if name.endswith("_s")]
QUANTITIES = ("ttft_s", "tpot_s", "jct_s", "normalized_latency_s")
_EARLY_S = 0.01
"""By this much a request may be scheduled before it is sent: client and engine note the times apart."""


def read_requests(run: MeasuredRun) -> pd.DataFrame:
    """Read the table of a run. Raises ConfigError, naming file and line, if it is missing or cannot be."""
    try:
        table = pd.read_csv(run.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {run.path}: {error}; install the package again") from None
    check_table(table, str(run.path))
    return table


def check_table(table: pd.DataFrame, source: str) -> None:
    """Raise ConfigError, naming the line and what would be right, for a table that no run can have left."""
    if missing := [column for column in COLUMNS if column not in table]:
        raise ConfigError(f"{source}, line 1: no column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    rows: list[dict[str, Any]] = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    if not rows:
        raise ConfigError(f"{source}: no requests in it; expected a row for each request")
    before = -np.inf
    for line, row in enumerate(rows, start=2):
        for name in COLUMNS:
            if not (isinstance(row[name], int | float) and np.isfinite(row[name])):
                raise ConfigError(f"{source}, line {line}: {name} must be a number, not {row[name]!r}")
        for name in ("prompt_tokens", "output_tokens"):
            if row[name] < 1:
                raise ConfigError(f"{source}, line {line}: {name} must be at least 1, not {row[name]!r}")
        times = [row[name] for name in _TIMES]
        if times[0] - _EARLY_S > times[1] or times[1:] != sorted(times[1:]):
            raise ConfigError(f"{source}, line {line}: {', '.join(_TIMES)} must ascend, in seconds; they are {times}")
        if times[0] < before:
            raise ConfigError(f"{source}, line {line}: it arrives before the request above it; sort by arrival_s")
        before = times[0]


def with_quantities(requests: pd.DataFrame) -> pd.DataFrame:
    """Add the columns QUANTITIES, in seconds and seconds a token; `tpot_s` is NaN for a single token."""
    arrival, first, last = (requests[name] for name in ("arrival_s", "first_token_s", "finished_s"))
    output = requests["output_tokens"]
    return requests.assign(
        ttft_s=first - arrival,
        tpot_s=((last - first) / (output - 1)).where(output > 1),
        jct_s=last - arrival,
        normalized_latency_s=(last - arrival) / output,
    )


def statistic_of(requests: pd.DataFrame, metric: str) -> float:
    """A metric such as `p99_ttft_s` over requests that have the QUANTITIES."""
    statistic, _, quantity = metric.partition("_")
    values = requests[quantity].dropna().to_numpy(float)
    return float(values.mean() if statistic == "mean" else np.percentile(values, int(statistic[1:])))
