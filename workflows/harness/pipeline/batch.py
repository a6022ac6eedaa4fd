"""A batch of runs: carry out each run, and write the results of all of them into a few files."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.core.errors import FastServeError
from fastserve.core.files import atomic_write
from fastserve.latency import load_profile
from harness.analysis.derived import derived_metrics
from harness.analysis.files import read_json, write_json
from harness.experiments.points import run_name
from harness.run.config import RunConfig, command_of
from harness.run.results import parquet_options
from harness.run.runner import run

TABLES = ("requests", "iterations")


class RunFailedError(FastServeError):
    """A run of a batch failed: which run, why, and the command that repeats it alone."""


@dataclass(frozen=True)
class RunResult:
    """What a run of a batch measured."""

    name: str
    metrics: Mapping[str, Any]
    meta: Mapping[str, Any]
    """The content of meta.json."""
    tables: Mapping[str, pa.Table]
    """`requests`, and `iterations` unless the run is simulated: then `command` gives them again."""
    seconds: float
    command: str
    """The command that repeats the run and writes its four files."""
    title: str
    said: str
    """What the run wrote to stderr."""

    @property
    def line(self) -> str:
        """A line for the log."""
        failed = self.metrics["failed"]
        return (
            f"{self.said}{self.title}: {self.metrics['mean_normalized_latency_s']:.3g} s/token"
            + (f", {failed} failed" if failed else "")
            + f", took {self.seconds:.1f} s"
        )


def carry_out(config: RunConfig) -> RunResult:
    """Carry out one run and return what it measured. Raises RunFailedError, which names the run."""
    start = time.monotonic()
    is_simulated = config.backend == "sim"
    said = io.StringIO()
    title = title_of(config)
    with TemporaryDirectory(prefix="fastbench-") as folder:
        out = Path(folder)
        try:
            with redirect_stderr(said) if is_simulated else nullcontext():
                metrics = run(config, out)
        except FastServeError as error:
            reason = getattr(error, "what", error)  # Without the place of meta.json, which is deleted.
            raise RunFailedError(f"{title}: {reason}; to repeat this run alone: {command_of(config)}") from error
        except Exception as error:
            error.add_note(f"in the run {title}; to repeat it alone: {command_of(config)}")
            raise
        tables = {name: pq.read_table(out / f"{name}.parquet") for name in TABLES[: 1 if is_simulated else 2]}
        meta = read_json(out / "meta.json")
    metrics |= derived_metrics(tables["requests"], load_profile(config.profile).latency if config.profile else None)
    seconds = time.monotonic() - start
    return RunResult(
        run_name(config), metrics, meta, tables, seconds, command_of(config), title, _warnings(said.getvalue())
    )


def title_of(config: RunConfig) -> str:
    """Name a run for the user."""
    rate = f" at {config.rate:g}/s" if config.rate is not None else ""
    workload = f"{config.trace}, {config.num_requests} requests{rate}, seed {config.seed}"
    return f"{config.policy}, {config.profile or config.model}, {workload}"


def write_batch(results: Sequence[RunResult], out: Path) -> None:
    """Write `out`, a JSON file, and beside it `NAME.requests.parquet` and, if there are any, iterations.

    The JSON file has `meta`, what the meta.json of all runs share, and `runs`: of each run by name its metrics, its
    seconds, the command that repeats it, and what differs in its meta.json. The tables have a column `run`.
    """
    shared = _shared([result.meta for result in results])
    runs = {
        result.name: {
            "metrics": result.metrics,
            "seconds": result.seconds,
            "command": result.command,
            "meta": _without(result.meta, shared),
        }
        for result in results
    }
    for name in TABLES:
        parts = [(result.name, result.tables[name]) for result in results if name in result.tables]
        if parts:
            _write_table(parts, out.with_suffix(f".{name}.parquet"))
    write_json({"meta": shared, "runs": runs}, out)


def read_batches(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Read the runs of batches, by name, each with its metrics, seconds and whole `meta`."""
    runs = {}
    for path in paths:
        batch = read_json(path)
        for name, result in batch["runs"].items():
            runs[name] = result | {"meta": _joined(batch["meta"], result["meta"])}
    return runs


def _write_table(parts: Sequence[tuple[str, pa.Table]], path: Path) -> None:
    """Write one table of all runs."""
    names = pa.DictionaryArray.from_arrays(
        pa.array([i for i, (_, part) in enumerate(parts) for _ in range(part.num_rows)], pa.int32()),
        [name for name, _ in parts],
    )
    table = pa.concat_tables([part for _, part in parts]).append_column("run", names)
    with atomic_write(path) as staging:
        pq.write_table(table, staging, **parquet_options(table.schema))


def _shared(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them have alike, key by key; inside a mapping too."""
    first, shared = metas[0], {}
    for key, value in first.items():
        if all(key in meta and meta[key] == value for meta in metas):
            shared[key] = value
        elif all(isinstance(meta.get(key), Mapping) for meta in metas):
            shared[key] = _shared([meta[key] for meta in metas])
    return shared


def _without(meta: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What `meta` has beside what is shared."""
    rest = {}
    for key, value in meta.items():
        if key not in shared:
            rest[key] = value
        elif shared[key] != value:
            rest[key] = _without(value, shared[key])
    return rest


def _joined(shared: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_without`."""
    joined = dict(shared)
    for key, value in rest.items():
        joined[key] = _joined(shared[key], value) if isinstance(shared.get(key), Mapping) else value
    return joined


def _warnings(said: str) -> str:
    """The warnings among what a run wrote to stderr, without its progress."""
    return "".join(f"{line}\n" for line in said.splitlines() if line.startswith("warning: "))
