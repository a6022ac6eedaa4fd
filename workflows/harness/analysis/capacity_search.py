"""The search of `fastbench capacity`: measure one rate after the other until the highest that meets an SLO is known."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError, NothingFinishedError
from fastserve.core.files import check_writable
from fastserve.core.processes import worker_pool
from harness.analysis.capacity_result import Objective, Result, values_of
from harness.analysis.intervals import mean_over_seeds
from harness.run.config import RunConfig
from harness.run.runner import read_traces, run
from harness.workload.traces.reading import files_read, take_over


def find_capacity(config: RunConfig, objective: Objective, out: Path, say: Callable[[str], None]) -> Result:
    """Search, write the result to the folder `out`, and return it. `say` gets a line for every measured rate.

    Rate and seed of `config` have no effect. Raises a FastServeError for bad input, before anything is written.
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
            value = float(mean_over_seeds(values_of(summaries[rate], objective.metric)))
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
    """Double the rate until one breaks the SLO, then bisect between it and the last rate within, to the tolerance."""
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
    """Number of concurrent runs: one for real engines and servers, since others would disturb their times."""
    return min(num_runs, os.cpu_count() or 1) if backend == "sim" else 1


def _quiet_run(config: RunConfig, folder: Path) -> dict[str, Any]:
    try:
        with redirect_stderr(io.StringIO()):  # The run's progress bar would overwrite the search's.
            return run(config, folder)
    except KeyboardInterrupt as interruption:
        interruption.__notes__ = []  # The files of the run are deleted with the search's folder.
        raise


def _why_undefined(objective: Objective, summaries: Sequence[dict[str, Any]], folders: Sequence[Path]) -> str:
    """Explain why the metric has no mean: the warnings of the first run without it, or its rejections."""
    metric = objective.metric
    seed, summary, folder = next(
        each for each in zip(objective.seeds, summaries, folders, strict=True) if each[1][metric] is None
    )
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    reasons = [*meta.get("warnings", ()), *meta.get("failed", ()), *meta["rejected"]]
    why = "; ".join(reasons[:2]) or "no request has it"
    return (
        f"{metric} is unknown for the run with seed {seed} ({summary['finished']} requests finished, "
        f"{summary['failed']} did not): {why}"
    )


def _provenance(meta: dict[str, Any]) -> dict[str, Any]:
    configuration = {name: value for name, value in meta["configuration"].items() if name not in ("rate", "seed")}
    return {"configuration": configuration, **{name: meta[name] for name in ("commit", "versions", "hardware")}}
