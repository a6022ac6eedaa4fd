"""The study: drive all servers with the same requests in turns, and compare each with the first."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd

from harness.analysis.files import write_csv, write_json
from harness.run.meta import environment_meta
from harness.studies.served.experiment import ServedExperiment
from harness.studies.served.server import StudiedServer
from harness.workload.arrivals import AT_ONCE

COMPARED = (
    "output_tokens_per_s",
    "mean_jct_s",
    "mean_normalized_latency_s",
    "p95_normalized_latency_s",
    "mean_ttft_s",
    "mean_tpot_s",
)
"""Keys of summary.json that comparison.csv shows."""


def measure_served(config: Mapping[str, Any], out: Path, vllm: Path | None = None) -> pd.DataFrame:
    """Carry out the experiment, write `out`/points.csv and the files behind it, and return that table.

    `config` is an experiment: `run` (trace, arrivals, dtype, device, torch_threads, settings with all sizes of the
    cache, and model unless there is an `architecture`), `series` (name, label, policy, server, run), `points`
    (num_requests and a load; the first has no load: its requests arrive together), `seeds`. A series' `server` is
    `fastserve` (the default), or a key of `VLLM`, which is installed in the environment `vllm`.

    1. Start each server, let it answer `agreement.csv`'s prompts, and serve as many requests as the first point has.
    2. Measure the first point. A load is a share of the service rate: the rate at which the first series' server
       completes the first point's requests, as the median over the seeds.
    3. Measure the other points at these rates. `out`/runs/SERIES/POINT/seed-S has the four files of each run.

    `comparison.csv` gives, for each series, point and quantity, the median over seeds and the ratio to the first series
    (median of the seeds' ratios), each with minimum and maximum; `agreement.csv` the share of greedy tokens equal to
    those of the first series; `servers.json` how every server was started and how it describes itself.

    Columns `server_cores`, `client_cores` and `other_cores` of the points say how many cores were busy, and for which
    processes, during a run. If other processes were busy, they affected the measurement.

    Raises ConfigError for bad input before any server is started. Raises ServerError if a server does not start, ends,
    or finishes no request of a run.
    """
    experiment = ServedExperiment.of(config, out, vllm)
    with ExitStack() as stack:
        servers = [StudiedServer(experiment, series, out, stack) for series in experiment.series]
        write_json({"servers": [server.described for server in servers], **environment_meta()}, out / "servers.json")
        write_csv(_agreement(servers, experiment.prompts()), out / "agreement.csv")
        first, *loaded = experiment.points
        rows = _in_turns(servers, experiment, first, AT_ONCE)
        service_rate = statistics.median(
            row["num_requests"] / row["duration_s"] for row in rows if row["series"] == servers[0].name
        )
        for point in loaded:
            rows += _in_turns(servers, experiment, point, float(f"{point['load'] * service_rate:.3g}"))
    order = {server.name: i for i, server in enumerate(servers)}
    table = pd.DataFrame(rows).sort_values("series", key=lambda names: names.map(order), kind="stable")
    write_csv(compared_with_first(table), out / "comparison.csv")
    write_csv(table, out / "points.csv")
    return table


def compared_with_first(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each series, point and quantity of `COMPARED`.

    `median`, `low` and `high` are the median, minimum and maximum over seeds; `ratio_median`, `ratio_low` and
    `ratio_high` those of the ratios to the first series' value of the same seed.
    """
    rows = []
    for x in table["x"].unique():
        at_x = table[table["x"] == x]
        for metric in COMPARED:
            values = at_x.pivot(index="seed", columns="series", values=metric).astype(float)
            ratios = values.div(values[table["series"].iloc[0]], axis="index")
            for name, label in dict(zip(at_x["series"], at_x["label"], strict=True)).items():
                row: dict[str, Any] = {"series": name, "label": label, "x": x, "metric": metric}
                for prefix, found in (("", values[name]), ("ratio_", ratios[name])):
                    statistics_of = {"median": found.median(), "low": found.min(), "high": found.max()}
                    row |= {f"{prefix}{statistic}": value for statistic, value in statistics_of.items()}
                rows.append(row)
    return pd.DataFrame(rows)


def _in_turns(
    servers: Sequence[StudiedServer], experiment: ServedExperiment, point: Mapping[str, Any], rate: float
) -> list[dict[str, Any]]:
    """Rows of a point: for each seed, each server once."""
    rows = []
    for i, seed in enumerate(experiment.seeds):
        first = i % len(servers)  # Another server is first with each seed, in case the first one has an advantage.
        for server in (*servers[first:], *servers[:first]):
            rows.append(server.row(point, experiment.run_config(point, rate, seed)))
    return rows


def _agreement(servers: Sequence[StudiedServer], prompts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """A row for each server: the shares of answers equal to the first server's, and of tokens before a difference."""
    expected = servers[0].answers(prompts)
    rows = []
    for server in servers:
        answers = server.answers(prompts)
        pairs = list(zip(answers, expected, strict=True))
        equal = sum(_num_equal(answer, other) for answer, other in pairs)
        row = {
            "series": server.name,
            "prompts": len(prompts),
            "tokens": sum(map(len, expected)),
            "equal_answers": statistics.mean(answer == other for answer, other in pairs),
            "equal_tokens": equal / sum(map(len, expected)),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _num_equal(answer: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer, other, strict=False)))
