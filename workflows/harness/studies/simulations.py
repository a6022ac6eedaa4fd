"""Simulations of runs of the real engine, and how far the two differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.run.config import RunConfig
from harness.run.runner import run
from harness.workload.arrivals import AT_ONCE


def simulated(config: RunConfig, profile: Path) -> RunConfig:
    """The same run in the simulator, with the iteration times of `profile`."""
    return RunConfig(
        backend="sim",
        policy=config.policy,
        trace=config.trace,
        arrivals=config.arrivals,
        rate=config.rate,
        num_requests=config.num_requests,
        seed=config.seed,
        history=config.history,
        history_requests=config.history_requests,
        profile=str(profile),
        tokenizer=config.tokenizer,
        settings=config.settings,
    )


def service_rate(simulation: RunConfig, num_requests: int, folder: Path) -> float:
    """Requests/s that the simulator completes if `num_requests` requests arrive together. The run goes to `folder`."""
    summary = run(replace(simulation, rate=AT_ONCE, num_requests=num_requests), folder)
    return num_requests / float(summary["duration_s"])


def compared(real: Path, sim: Path, metrics: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    """Compare the summaries in two runs' folders.

    Gives real_, sim_ and error_ = (sim - real) / real of each metric, and real_ and sim_ of each count. An error is
    None if one of the runs has no value because no request finished.
    """
    measured, expected = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (real, sim))
    row: dict[str, Any] = {}
    for metric in metrics:
        row |= {f"real_{metric}": measured[metric], f"sim_{metric}": expected[metric]}
        known = measured[metric] and expected[metric] is not None
        row[f"error_{metric}"] = expected[metric] / measured[metric] - 1 if known else None
    for count in counts:
        row |= {f"real_{count}": measured[count], f"sim_{count}": expected[count]}
    return row
