"""The comparison of a real run with its simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run.config import RunConfig
from harness.studies.simulations import compared

METRICS = ("mean_jct_s", "p95_jct_s", "mean_normalized_latency_s", "p95_normalized_latency_s", "mean_ttft_s")
"""The compared keys of summary.json."""
COUNTS = ("preemptions", "iterations")
"""Further keys of summary.json that the table shows."""


@dataclass(frozen=True)
class Pair:
    """A real run and its simulation: one row of the table."""

    series: Mapping[str, Any]
    load: float
    config: RunConfig
    """The real run."""
    folder: Path
    """Holds `real` and `sim`, the two runs, and profile.json."""

    def row(self) -> dict[str, Any]:
        """Both runs and their differences, read from their files."""
        row = {
            "series": self.series["name"],
            "label": self.series["label"],
            "policy": self.config.policy,
            "load": self.load,
            "rate": self.config.rate,
            "num_requests": self.config.num_requests,
            "seed": self.config.seed,
        }
        row |= compared(self.folder / "real", self.folder / "sim", METRICS, COUNTS)
        profile = json.loads((self.folder / "profile.json").read_text(encoding="utf-8"))
        row["processor_share"] = profile["provenance"]["processor_share"]
        return row | {"real_run": (self.folder / "real").as_posix(), "sim_run": (self.folder / "sim").as_posix()}
