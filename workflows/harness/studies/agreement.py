"""Compare recorded runs of the real engine with simulations of them, which use the profile of the same machine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError, FastServeError
from harness.analysis.files import read_json, write_csv
from harness.run.runner import run
from harness.studies.recorded.plan import RecordedRun, read_plan
from harness.studies.simulations import compared, simulated

METRICS = tuple(
    f"{statistic}_{quantity}"
    for quantity in ("jct_s", "normalized_latency_s", "ttft_s")
    for statistic in ("mean", "p50", "p95")
)
"""The compared keys of summary.json."""
COUNTS = ("failed", "preemptions", "swap_out_bytes", "swap_in_bytes", "iterations", "duration_s", "output_tokens_per_s")
"""Further keys of summary.json that the table shows."""
JUDGED = ("mean_normalized_latency_s", "p95_normalized_latency_s")
"""Metrics that must agree."""
BOUND = 0.05
"""Largest relative error that counts as agreement."""
_LABELS = {"fastserve": "FastServe", "fastserve-fcfs": "FastServe-FCFS", "vllm": "vLLM"}


def recorded_folders(results: Path) -> list[Path]:
    """List the folders below `results`/recorded that hold a plan and at least one run, by name."""
    plans = sorted((results / "recorded").glob("*/plan.json"))
    return [plan.parent for plan in plans if any(plan.parent.glob("runs/*/summary.json"))]


def compare(recorded: Path, simulations: Path) -> pd.DataFrame:
    """Simulate each run of `recorded` into a folder of its name below `simulations`; return a row for each run.

    The columns:
    - real_, sim_ and error_ = (sim - real) / real of each metric, in seconds or seconds a token;
    - real_ and sim_ of each count;
    - real_ and sim_stalled_s: time in which transfers kept the engine from computing;
    - real_ and sim_swapping_s: time in which a request was due and its cache swapped out, summed over requests;
    - real_transfer_s: time with at least one transfer; real_hidden_share: the part of it that was not stalled.

    Raises ConfigError if the folder holds no run, or if a trace gives other requests now than when it was recorded.
    """
    plan = read_plan(recorded)
    rows = [_row(each, recorded, simulations) for each in plan.runs if each.is_there(recorded)]
    if not rows:
        raise ConfigError(f"{recorded} holds none of its {len(plan.runs)} runs yet; `make gpu` records them")
    return pd.DataFrame(rows)


def within_bound(table: pd.DataFrame) -> pd.Series:
    """For each row, whether mean and P95 normalized latency of simulation and real run agree within `BOUND`."""
    return (table[[f"error_{metric}" for metric in JUDGED]].abs() <= BOUND).all(axis=1)


def _row(each: RecordedRun, recorded: Path, simulations: Path) -> dict[str, Any]:
    real, sim, config = each.folder(recorded), simulations / each.name, each.config
    run(simulated(config, recorded / "profile.json"), sim)
    metas = [read_json(folder / "meta.json") for folder in (real, sim)]
    if metas[0]["trace"]["digest"] != metas[1]["trace"]["digest"]:
        raise ConfigError(
            f"{real}: trace {config.trace!r} with seed {config.seed} gives other requests now than when this was "
            "recorded; restore the trace's table, or record anew"
        )
    row: dict[str, Any] = {
        "series": config.policy,
        "label": _LABELS.get(config.policy, config.policy),
        "policy": config.policy,
        "trace": config.trace,
        "max_batch_size": config.settings["max_batch_size"],
        "memory": each.memory,
        "load": each.load,
        "rate": config.rate,
        "num_requests": config.num_requests,
        "seed": config.seed,
        **compared(real, sim, METRICS, COUNTS),
    }
    for kind, folder in (("real", real), ("sim", sim)):
        row[f"{kind}_stalled_s"] = _total(folder / "iterations.parquet", "stalled_s")
        row[f"{kind}_swapping_s"] = _total(folder / "requests.parquet", "swapping_s")
    transfer_s = _time_covered(pd.read_parquet(real / "transfers.parquet"))
    row["real_transfer_s"] = transfer_s
    row["real_hidden_share"] = max(0.0, 1 - row["real_stalled_s"] / transfer_s) if transfer_s else None
    return row | {"real_run": real.as_posix(), "sim_run": sim.as_posix()}


def _total(path: Path, column: str) -> float:
    return float(pd.read_parquet(path, columns=[column])[column].sum())


def _time_covered(transfers: pd.DataFrame) -> float:
    """Seconds with at least one transfer."""
    times = transfers.sort_values("start_s")
    start, end = times["start_s"].to_numpy(float), times["end_s"].to_numpy(float)
    covered_until = np.maximum.accumulate(np.concatenate(([-np.inf], end)))[:-1]
    return float(np.maximum(0.0, end - np.maximum(start, covered_until)).sum())


def describe(table: pd.DataFrame) -> list[str]:
    """Describe, for each policy, how many runs agree, the errors, and how much of the transfers' time was hidden."""
    lines = []
    for label, rows in table.groupby("label", sort=False):
        errors = [
            f"{metric.partition('_')[0]} {rows[f'error_{metric}'].mean():+.1%} on average, "
            f"{rows[f'error_{metric}'].abs().max():.1%} at most"
            for metric in JUDGED
        ]
        hidden = rows["real_hidden_share"].dropna().astype(float)
        lines.append(
            f"{label}: {within_bound(rows).sum()} of {len(rows)} runs within {BOUND:.0%}; normalized latency: "
            + "; ".join(errors)
            + (f"; at least {hidden.min():.1%} of transfer time hidden" if len(hidden) else "")
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: compare a folder, print how well it agrees, and write FOLDER/points.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that harness.studies.recorded wrote")
    folder = parser.parse_args(arguments).folder
    try:
        with tempfile.TemporaryDirectory() as scratch:
            table = compare(folder, Path(scratch)).drop(columns="sim_run")
        write_csv(table, folder / "points.csv")
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(describe(table)))
    print(f"wrote {folder / 'points.csv'}: {len(table)} runs")


if __name__ == "__main__":
    main()
