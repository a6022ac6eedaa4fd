"""How far the simulation of a measured run is from what was measured, and whether that is within the goal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from harness.studies.measured.table import statistic_of

GOALS: Mapping[str, float] = {"mean": 0.03, "p50": 0.05, "p90": 0.05, "p99": 0.05}
"""By statistic, the largest relative error that counts as agreement."""
JUDGED = ("ttft_s", "tpot_s", "jct_s")
"""Quantities that the goals are for."""
COLUMNS = ("run", "gpu", "metric", "measured", "simulated", "error", "goal", "met", "llmservingsim_error")
NAMES: Mapping[str, str] = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "jct_s": "completion time",
    "normalized_latency_s": "normalized latency",
}
_PEER_KEYS = ["run", "metric"]


def errors_of(measured: pd.DataFrame, simulated: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each statistic of each quantity: both values in seconds, error = (simulated - measured) / measured.

    Both tables have the same requests, with the QUANTITIES.
    """
    rows = []
    for quantity in JUDGED:
        for statistic, goal in GOALS.items():
            metric = f"{statistic}_{quantity}"
            real, ours = statistic_of(measured, metric), statistic_of(simulated, metric)
            error = ours / real - 1
            met = "yes" if abs(error) <= goal else "no"
            rows.append(
                {"metric": metric, "measured": real, "simulated": ours, "error": error, "goal": goal, "met": met}
            )
    return rows


def with_peer(errors: pd.DataFrame, peer: pd.DataFrame) -> pd.DataFrame:
    """Add the errors that LLMServingSim publishes for the same runs; NaN where it publishes none."""
    joined = errors.merge(peer[[*_PEER_KEYS, "error"]], on=_PEER_KEYS, how="left", suffixes=("", "_of_peer"))
    return joined.rename(columns={"error_of_peer": "llmservingsim_error"})[list(COLUMNS)]


def describe_errors(errors: pd.DataFrame) -> list[str]:
    """A line for each run: how many statistics are within their goals, and which are not."""
    lines = []
    for gpu, rows in errors.groupby("gpu", sort=False):
        missed = rows[rows["met"] != "yes"]
        line = f"{gpu}: {len(rows) - len(missed)} of {len(rows)} statistics within the goal"
        if len(missed):
            beyond = zip(missed["metric"], missed["error"], strict=True)
            named = [f"{metric_name(metric)} {signed_percent(error)}" for metric, error in beyond]
            line += f"; beyond it: {', '.join(named)}"
        lines.append(line)
    return lines


def errors_page(errors: pd.DataFrame) -> str:
    """The table in Markdown: times in ms, errors in percent."""
    lines = [
        "| GPU | quantity | measured (ms) | simulated (ms) | error | goal | within | LLMServingSim's error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    row: Any
    for row in errors.itertuples():
        peer = "not published" if pd.isna(row.llmservingsim_error) else signed_percent(row.llmservingsim_error)
        lines.append(
            f"| {row.gpu} | {metric_name(row.metric)} | {milliseconds(row.measured)} | {milliseconds(row.simulated)} "
            f"| {signed_percent(row.error)} | {row.goal:.0%} | {row.met} | {peer} |"
        )
    return "\n".join(lines) + "\n"


def metric_name(metric: str) -> str:
    """Write `p99_ttft_s` as "P99 TTFT"."""
    statistic, _, quantity = metric.partition("_")
    return f"{statistic if statistic == 'mean' else statistic.upper()} {NAMES.get(quantity, quantity)}"


def milliseconds(seconds: float) -> str:
    """Write a time in ms: with a decimal below 1 s."""
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds:.1f}"


def signed_percent(share: float) -> str:
    """Write a relative error in percent with its sign; none for 0.0 %."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}%" if rounded else "0.0%"
