"""What a search for a capacity looks for, and what it finds: the objective, the measured rates, and their files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from harness.analysis.capacity import capacity_estimate, is_monotone, largest_fall
from harness.analysis.intervals import LEAST_SEEDS, LEVEL, Estimate, FloatArray, mean_over_seeds
from harness.run.profile_range import range_warning
from harness.run.replaced import replacement_note
from harness.run.summary import PERCENTILES, SUMMARIZED, why_late

METRICS = tuple(f"{statistic}_{name}" for name in SUMMARIZED for statistic in ("mean", *map("p{}".format, PERCENTILES)))
"""Keys of summary.json that an objective can bound, in seconds or seconds a token; all rise with the load."""
COLUMNS = ("rate", "seed", "finished", "failed")
"""Columns of capacity.csv before the metric."""
_MIN_TOLERANCE = 1e-4
_WIDEST = 1e9


@dataclass(frozen=True)
class Objective:
    """The objective: the highest rate at which the mean over `seeds` of `metric` is at most `slo`.

    The search covers rates from `low` to `high`, in requests/s. It stops when passing and failing rates differ by at
    most `tolerance`, as a fraction. Raises ConfigError for values out of range.
    """

    slo: float
    metric: str = "mean_normalized_latency_s"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    low: float = 0.5
    high: float = 1000.0
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"unknown metric {self.metric!r}; valid: {', '.join(METRICS)}")
        if not (math.isfinite(self.slo) and self.slo > 0):
            raise ConfigError(f"--slo must be a number above 0, in seconds or seconds a token, not {self.slo}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"--seeds must be different whole numbers of at least 0, not {list(self.seeds)}")
        if not (0 < self.low < self.high < math.inf):
            raise ConfigError(f"--low and --high must be 0 < low < high, not {self.low:g} and {self.high:g}")
        if self.high > _WIDEST * self.low:
            raise ConfigError(
                f"--high {self.high:g} is more than {_WIDEST:g} times --low {self.low:g}, and rates double "
                "from one to the other; raise --low or lower --high"
            )
        if not (_MIN_TOLERANCE <= self.tolerance < 1):
            raise ConfigError(f"--tolerance must be at least {_MIN_TOLERANCE:g} and below 1, not {self.tolerance:g}")


@dataclass(frozen=True)
class Result:
    """The result of a search: summaries by rising rate, each in the order of the seeds, and what follows from them.

    `provenance` is meta.json of a run, without the keys that differ between runs.
    """

    objective: Objective
    summaries: dict[float, list[dict[str, Any]]]
    provenance: dict[str, Any]
    unfinished: str = ""
    """The reason why the first unfinished request did not finish."""

    @property
    def rates(self) -> list[float]:
        """Every measured rate, rising."""
        return list(self.summaries)

    @property
    def values(self) -> FloatArray:
        """The metric, [seeds, rates]."""
        return np.array([values_of(row, self.objective.metric) for row in self.summaries.values()]).T

    @property
    def mean(self) -> FloatArray:
        """The mean of the metric over the seeds, [rates]."""
        return mean_over_seeds(self.values)

    @property
    def capacity(self) -> Estimate:
        """The rate at which the mean over seeds first exceeds the SLO, with its interval over seeds."""
        return capacity_estimate(self.rates, self.values, self.objective.slo)

    @property
    def bracket(self) -> tuple[float | None, float | None]:
        """The neighbouring measured rates within and beyond the SLO; None if there is no such rate."""
        rates, first = self.rates, int(np.argmax([*(self.mean > self.objective.slo), True]))
        return (rates[first - 1] if first else None), (rates[first] if first < len(rates) else None)

    def describe(self) -> Iterator[str]:
        """Yield the result in lines of text."""
        capacity, (within, beyond), mean = self.capacity, self.bracket, self.mean
        metric, bound = self.objective.metric, f"{self.objective.slo:g}"
        if within is None:
            yield f"no capacity: {metric} exceeds {bound} already at the lowest, {beyond:g} requests/s; lower --low"
        elif beyond is None:
            yield (
                f"no capacity: {metric} is within {bound} at every rate up to {within:g} requests/s; raise --high, or "
                "--num-requests if the burst ends before its queue is long"
            )
        else:
            yield f"capacity {capacity.value:.4g} requests/s"
            yield f"{metric} is within {bound} at {within:.4g} requests/s, above it at {beyond:.4g}"
            if capacity.low is None or capacity.high is None:
                yield f"no interval: it needs {LEAST_SEEDS} seeds"
            else:
                low = f"below {self.rates[0]:.4g}" if capacity.low == -math.inf else f"{capacity.low:.4g}"
                high = f"above {self.rates[-1]:.4g}" if capacity.high == math.inf else f"{capacity.high:.4g}"
                yield f"95 % interval {low} to {high} requests/s, by jackknife-t over {len(self.objective.seeds)} seeds"
        if not is_monotone(mean):
            yield f"not monotone: {metric} falls by up to {largest_fall(mean):.1%} where the rate rises"
        failed, finished = (
            sum(row[of] for rows in self.summaries.values() for row in rows) for of in ("failed", "finished")
        )
        if failed:
            yield (
                f"{failed} of {failed + finished} requests did not finish and count in no latency; {self.unfinished}; "
                "`fastbench run` with the same options and one of the rates writes more reasons to meta.json"
            )
        if late := why_late([row for rows in self.summaries.values() for row in rows]):
            yield late
        profile = self.provenance.get("configuration", {}).get("profile")
        if outside := range_warning([row for rows in self.summaries.values() for row in rows], profile):
            yield f"at one of the rates, {outside}"

    def write(self, out: Path) -> str:
        """Write capacity.csv, a row per measured rate and seed, and capacity.json.

        Returns a note if this replaces a search of another configuration, else an empty text. Raises OutputError if the
        files cannot be written.
        """
        capacity, mean = self.capacity, self.mean
        interval = None
        if capacity.value is not None and capacity.low is not None and capacity.high is not None:
            # JSON has no infinity: an open end is null.
            interval = [end if math.isfinite(end) else None for end in (capacity.low, capacity.high)]
        content = {
            "capacity": capacity.value,
            "note": capacity.note,
            "interval": interval,
            "interval_level": LEVEL,
            "bracket": self.bracket,
            "monotone": is_monotone(mean),
            "largest_fall": largest_fall(mean),
            "objective": asdict(self.objective),
            **self.provenance,
        }
        note = replacement_note(
            out / "capacity.json", content, "objective", *self.provenance.keys() & {"configuration"}
        )
        with atomic_write(out / "capacity.csv") as table, atomic_write(out / "capacity.json") as result:
            with table.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(
                    file, [*COLUMNS, self.objective.metric], extrasaction="ignore", lineterminator="\n"
                )
                writer.writeheader()
                writer.writerows(row for summaries in self.summaries.values() for row in summaries)
            result.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return note


def values_of(summaries: Sequence[dict[str, Any]], metric: str) -> FloatArray:
    """The metric of each summary, NaN where it has none."""
    return np.array([summary[metric] for summary in summaries], dtype=float)
