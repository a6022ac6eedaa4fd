"""The search of `fastbench capacity`: runs at one rate after the other until the highest that meets an SLO is known."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError, NothingFinishedError
from fastserve.core.files import atomic_write, check_writable
from fastserve.core.processes import worker_pool
from harness.analysis.capacity import capacity_estimate, is_monotone, largest_fall
from harness.analysis.intervals import LEVEL, Estimate, FloatArray, mean_over_seeds
from harness.run.config import RunConfig
from harness.run.replaced import replacement_note
from harness.run.results import PERCENTILES, SUMMARIZED, why_late
from harness.run.runner import read_traces, run
from harness.workload.traces.reading import files_read, take_over

METRICS = tuple(f"{statistic}_{name}" for name in SUMMARIZED for statistic in ("mean", *map("p{}".format, PERCENTILES)))
"""Keys of summary.json that rise with the load: what an objective can bound, in seconds or seconds a token."""
COLUMNS = ("rate", "seed", "finished", "failed")
"""Columns of capacity.csv before the metric."""
_MIN_TOLERANCE = 1e-4
_WIDEST = 1e9


@dataclass(frozen=True)
class Objective:
    """What is looked for: the highest rate at which the mean over `seeds` of `metric` is at most `slo`.

    Rates are looked at from `low` to `high`, in requests/s; it is found when the lowest rate known to break the SLO is
    at most `tolerance` (relative) above the highest known to meet it.
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
            raise ConfigError(
                f"--slo must be a number above 0, in seconds (a token, where the metric is), not {self.slo}"
            )
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
    """What a search measured: summaries by rate, rising, each in the order of the seeds; and what follows from them.

    `provenance` is meta.json of a run, without what differs between runs.
    """

    objective: Objective
    summaries: dict[float, list[dict[str, Any]]]
    provenance: dict[str, Any]
    unfinished: str = ""
    """Why the first request that did not finish did not."""

    @property
    def rates(self) -> list[float]:
        """Every measured rate, rising."""
        return list(self.summaries)

    @property
    def values(self) -> FloatArray:
        """The metric, [seeds, rates]."""
        return np.array([_values(row, self.objective.metric) for row in self.summaries.values()]).T

    @property
    def mean(self) -> FloatArray:
        """The mean of the metric over the seeds, [rates]."""
        return mean_over_seeds(self.values)

    @property
    def capacity(self) -> Estimate:
        """Where the mean over seeds first exceeds the SLO; interval: the same for seeds drawn with replacement."""
        return capacity_estimate(self.rates, self.values, self.objective.slo)

    @property
    def bracket(self) -> tuple[float | None, float | None]:
        """The neighbouring measured rates, the first within the SLO and the second beyond; None where there is none."""
        rates, first = self.rates, int(np.argmax([*(self.mean > self.objective.slo), True]))
        return (rates[first - 1] if first else None), (rates[first] if first < len(rates) else None)

    def describe(self) -> Iterator[str]:
        """The result in lines of text."""
        capacity, (within, beyond), mean = self.capacity, self.bracket, self.mean
        metric, bound = self.objective.metric, f"{self.objective.slo:g}"
        if within is None:
            yield f"no capacity: {metric} exceeds {bound} already at the lowest, {beyond:g} requests/s; lower --low"
        elif beyond is None:
            yield (
                f"no capacity: {metric} is within {bound} at every rate up to {within:g} requests/s; raise --high, or "
                "--num-requests where so few requests are a burst that ends before its queue is long"
            )
        else:
            yield f"capacity {capacity.value:.4g} requests/s"
            yield f"{metric} is within {bound} at {within:.4g} requests/s, above it at {beyond:.4g}"
            if capacity.low is None or capacity.high is None:
                yield "no interval: it needs two seeds"
            else:
                low = f"below {self.rates[0]:.4g}" if capacity.low == -math.inf else f"{capacity.low:.4g}"
                high = f"above {self.rates[-1]:.4g}" if capacity.high == math.inf else f"{capacity.high:.4g}"
                yield f"95 % interval {low} to {high} requests/s, by bootstrap over {len(self.objective.seeds)} seeds"
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

    def write(self, out: Path) -> str:
        """Write capacity.csv, a row per measured rate and seed, and capacity.json. OutputError if the disk refuses.

        Gives a note if a search of another configuration was there, else an empty text.
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


def find_capacity(config: RunConfig, objective: Objective, out: Path, say: Callable[[str], None]) -> Result:
    """Search, write to the folder `out`, and return what was found. `say` is told of every rate measured.

    Rate and seed of `config` do not matter. Raises a FastServeError for bad input; nothing is written then.
    """
    for name in ("capacity.csv", "capacity.json"):
        check_writable(out / name)
    summaries: dict[float, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbench-")))
        read_traces(replace(config, rate=objective.low))
        workers = _num_workers(config.backend, len(objective.seeds))
        have_traces = partial(take_over, files_read())
        each = stack.enter_context(worker_pool(workers, have_traces)).map if workers > 1 else map

        def measure(rate: float) -> float:
            configs = [replace(config, rate=rate, seed=seed) for seed in objective.seeds]
            folders = [folder / f"rate-{rate!r}" / f"seed-{seed}" for seed in objective.seeds]
            summaries[rate] = []
            with Progress(f"rate {rate:g}", len(configs)) as progress:
                try:
                    for summary in each(_quiet_run, configs, folders):
                        summaries[rate].append(summary)
                        progress.advance()
                except NothingFinishedError as error:
                    where = "`fastbench run` with that rate and the same options writes more reasons to meta.json"
                    raise NothingFinishedError(f"at {rate:g} requests/s, {error.what}", where) from error
            value = float(mean_over_seeds(_values(summaries[rate], objective.metric)))
            if math.isnan(value):
                raise ConfigError(f"at {rate:g} requests/s {_why_undefined(objective, summaries[rate], folders)}")
            verdict = "within" if value <= objective.slo else "above"
            say(f"{rate:10.4g} requests/s: {objective.metric} {value:.4g}, {verdict} the SLO")
            return value

        bisect(measure, objective)
        metas = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*/meta.json"))]
    reasons = (reason for meta in metas for reason in meta["rejected"] + meta["failed"])
    result = Result(objective, dict(sorted(summaries.items())), _provenance(metas[0]), next(reasons, ""))
    if note := result.write(out):
        say(f"warning: {note}")
    return result


def bisect(measure: Callable[[float], float], objective: Objective) -> None:
    """Measure doubling rates until one breaks the SLO, then between it and the last within, to the tolerance."""
    within: float | None = None
    beyond: float | None = None
    rate = objective.low
    while True:
        if measure(rate) <= objective.slo:
            within = rate
        else:
            beyond = rate
        if within is None or within >= objective.high:
            return
        if beyond is None:
            rate = min(2 * within, objective.high)
        elif beyond <= within * (1 + objective.tolerance):
            return
        else:
            rate = (within + beyond) / 2


def _num_workers(backend: str, num_runs: int) -> int:
    """Runs side by side; one for real engines and servers, whose times others would disturb."""
    return min(num_runs, os.cpu_count() or 1) if backend == "sim" else 1


def _quiet_run(config: RunConfig, folder: Path) -> dict[str, Any]:
    try:
        with redirect_stderr(io.StringIO()):  # its own progress bar would write over ours
            return run(config, folder)
    except KeyboardInterrupt as interruption:
        interruption.__notes__ = []  # What the run wrote before its end goes with the search.
        raise


def _values(summaries: Sequence[dict[str, Any]], metric: str) -> FloatArray:
    return np.array([summary[metric] for summary in summaries], dtype=float)


def _why_undefined(objective: Objective, summaries: Sequence[dict[str, Any]], folders: Sequence[Path]) -> str:
    """Why the metric has no mean: what the first run without it warns of, or refused."""
    metric = objective.metric
    seed, summary, folder = next(
        each for each in zip(objective.seeds, summaries, folders, strict=True) if each[1][metric] is None
    )
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    reasons = [*meta.get("warnings", ()), *meta.get("failed", ()), *meta["rejected"]]
    why = "; ".join(reasons[:2]) or "none of its requests has one"
    return (
        f"{metric} cannot be told of the run with seed {seed}, which finished {summary['finished']} requests and not "
        f"{summary['failed']}: {why}"
    )


def _provenance(meta: dict[str, Any]) -> dict[str, Any]:
    configuration = {name: value for name, value in meta["configuration"].items() if name not in ("rate", "seed")}
    return {"configuration": configuration, **{name: meta[name] for name in ("commit", "versions", "hardware")}}
