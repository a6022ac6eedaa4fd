"""Servers side by side: ours under several policies and vLLM's own, with the same model, driven by the same client.

All of them are started, one after the other, and wait stopped (SIGSTOP), so that they take no processor. Then they take
turns, point by point and repeat by repeat: the speed of a shared machine wanders, and so each sees the same of it. A
repeat is a seed: requests of its own, the same for all servers.
"""

from __future__ import annotations

import http.client
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import psutil

from baselines.external.environment import python_of, versions_in
from baselines.external.process import ServerProcess, free_port
from baselines.external.vllm import VllmServer
from fastserve.core.checks import require_positive
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError, ServerError
from fastserve.policies.settings import resolve_settings
from harness.analysis.points import write_csv, write_json
from harness.client.server import contact, message_of
from harness.run.config import RunConfig
from harness.run.meta import environment_meta
from harness.run.runner import run
from harness.studies.fidelity import AT_ONCE
from harness.studies.model_folder import write_model_folder
from harness.workload.workload import make_workload

OURS = "fastserve"
VLLM = {"vllm": False, "vllm-chunked": True}
"""Servers that are vLLM's, and whether they cut prompts."""
COMPARED = (
    "output_tokens_per_s",
    "mean_jct_s",
    "mean_normalized_latency_s",
    "p95_normalized_latency_s",
    "mean_ttft_s",
    "mean_tpot_s",
)
"""Keys of summary.json whose medians and ratios are told."""
_READY_WITHIN_S = 600.0
_WARMUP_REQUESTS = 2
"""Before the clock of each run starts: the server has stood still until then."""
_DRAIN_LIMIT_S = 120.0
_AGREEING_PROMPTS, _AGREEING_TOKENS = 8, 32


def measure_served(config: Mapping[str, Any], out: Path, vllm: Path | None = None) -> pd.DataFrame:
    """Carry out the experiment; write `out`/points.csv and what it comes from, and return that table.

    `config` is an experiment: `run` (trace, arrivals, dtype, device, torch_threads, settings with all sizes of the
    cache, and model where there is no `architecture`), `series` (name, label, policy, server, run), `points`
    (num_requests and a load, but for the first, whose requests are all there at once), `seeds`. A series' `server` is
    `fastserve` (where it says none) or of `VLLM`, which is installed in the environment `vllm`.

    1. Each server is started, answers `agreement.csv`'s prompts, and serves as many requests as the first point has.
    2. The first point. A load is the share of the service rate: that at which the first series' server completes the
       first point's requests, in the median over the seeds.
    3. The other points, at these rates. Of each run the four files are in `out`/runs/SERIES/POINT/seed-S.

    `comparison.csv` has of each series, point and quantity the median over seeds, and the ratio to the first series'
    (the median of the seeds' ratios), each with the least and the most; `agreement.csv` the share of greedy tokens
    that are those of the first series; `servers.json` how every server was started and what it said of itself.

    Columns `server_cores`, `client_cores` and `other_cores` of the points say how many cores were busy for whom while a
    run lasted. If others had a part in it, the measurement is theirs, too.

    Raises ConfigError for bad input before anything is started, ServerError if a server does not come up, ends or
    finishes no request of a run.
    """
    experiment = _Experiment.of(config, out, vllm)
    with ExitStack() as stack:
        servers = [_Server(experiment, series, out, stack) for series in experiment.series]
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
    """A row each series, point and quantity of `COMPARED`: the median over seeds, and that of the ratios to the first
    series' value of the same seed; `low` and `high` are the least and the most of each."""
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


# -- what is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Experiment:
    series: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]
    """The first has all requests at once; the others have a load."""
    seeds: Sequence[int]
    run: Mapping[str, Any]
    model: str
    """A folder or a preset."""
    model_config: ModelConfig
    vllm: Path | None
    """The environment that vLLM is installed in."""

    @classmethod
    def of(cls, config: Mapping[str, Any], out: Path, vllm: Path | None) -> _Experiment:
        first, *loaded = config["points"]
        if "load" in first or not all("load" in point for point in loaded):
            raise ConfigError(
                "the first point's requests are all there at once, so it has no load; all others need one"
            )
        for point in loaded:
            require_positive("load", point["load"])
        known = (OURS, *VLLM)
        for series in config["series"]:
            server = _server_of(series)
            if server not in known:
                raise ConfigError(f"series {series['name']!r}: unknown server {server!r}; known: {', '.join(known)}")
            if server in VLLM and (vllm is None or not python_of(vllm).exists()):
                raise ConfigError(
                    f"series {series['name']!r}: vLLM is not installed at {vllm}; `make real-vllm` does it"
                )
            options, _ = resolve_settings(series["policy"], _settings(config, series))
            if options.num_gpu_blocks is None or options.num_host_blocks is None:
                raise ConfigError("set num_gpu_blocks and num_host_blocks: all servers must have the same cache")
        model, model_config = _model(config, out)
        environment = vllm.absolute() if vllm else None
        return cls(config["series"], config["points"], config["seeds"], config["run"], model, model_config, environment)

    def run_config(self, point: Mapping[str, Any], rate: float, seed: int) -> RunConfig:
        """A run, but for which server and policy it is of."""
        return RunConfig(
            backend="http",
            trace=self.run["trace"],
            arrivals=self.run.get("arrivals", "poisson"),
            rate=rate,
            num_requests=point["num_requests"],
            seed=seed,
            vocab_size=self.model_config.vocab_size,
            warmup=_WARMUP_REQUESTS,
            drain_limit_s=_DRAIN_LIMIT_S,
        )

    def prompts(self) -> list[list[int]]:
        """Those that all servers must answer alike."""
        config = self.run_config(self.points[0], AT_ONCE, self.seeds[0])
        workload = make_workload(config.trace, config.arrivals, config.rate, _AGREEING_PROMPTS, config.seed)
        return [workload.prompt_token_ids(i, self.model_config.vocab_size) for i in range(len(workload))]


def _server_of(series: Mapping[str, Any]) -> str:
    return str(series.get("server", OURS))


def _settings(config: Mapping[str, Any], series: Mapping[str, Any]) -> dict[str, Any]:
    return {**config["run"].get("settings", {}), **series.get("run", {}).get("settings", {})}


def _model(config: Mapping[str, Any], out: Path) -> tuple[str, ModelConfig]:
    """The model as a server is told it; one of the experiment's own is written to `out`/model."""
    from fastserve.runtime.models.source import resolve_model

    if "architecture" in config:
        return str(out / "model"), write_model_folder(config["architecture"], out / "model")
    if "model" not in config["run"]:
        raise ConfigError("the experiment needs an architecture, or run.model")
    model, load_format = config["run"]["model"], config["run"].get("load_format", "auto")
    return model, resolve_model(model, load_format)[0]


# -- servers -----------------------------------------------------------------------------------------------------------


class _Server:
    """A server that runs while it has its turn. Making one starts it, waits, and warms it up."""

    def __init__(self, experiment: _Experiment, series: Mapping[str, Any], out: Path, stack: ExitStack) -> None:
        self.name: str = series["name"]
        self._series = series
        self._runs = out / "runs" / self.name
        port, log = free_port(), out / "logs" / f"{self.name}.log"
        if (kind := _server_of(series)) in VLLM:
            assert experiment.vllm is not None
            vllm = _vllm(experiment, series, port)
            packages: Mapping[str, str] | None = versions_in(experiment.vllm)
            command, variables = vllm.command(), vllm.variables()
        else:
            packages = None
            command, variables = _ours(experiment, series, port), {}
        print(f"{series['label']}: starting, log in {log}", flush=True)
        began = time.monotonic()
        self.process = stack.enter_context(
            ServerProcess(series["label"], command, f"http://127.0.0.1:{port}", log, variables)
        )
        self.process.wait_until_ready(_READY_WITHIN_S)
        ready_s = time.monotonic() - began
        said = contact(self.process.url)
        self.described = {
            "series": self.name,
            "label": series["label"],
            "server": kind,
            "version": said.version,
            "command": command,
            "variables": variables,
            "packages": packages,
            "model": dict(said.card),
            "seconds_to_start": round(ready_s, 1),
        }
        """What servers.json has of it."""
        self._model = said.model
        print(f"{series['label']}: ready after {ready_s:.0f} s", flush=True)
        warm_up = experiment.run_config(experiment.points[0], AT_ONCE, max(experiment.seeds) + 1)
        with self.process.running():
            self._run(warm_up, self._runs / "warm-up")

    def row(self, point: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
        """Have it run while it serves these requests; the run's row of points.csv."""
        x = point.get("x", point.get("load"))
        folder = self._runs / str(x).replace(" ", "-") / f"seed-{config.seed}"
        with self.process.running():
            cores = _Cores(self.process)
            summary = self._run(config, folder)
            taken = cores.taken()
        print(
            f"{self._series['label']}, {x}, seed {config.seed}: {summary['output_tokens_per_s']:.0f} tokens/s, "
            f"{1000 * summary['mean_normalized_latency_s']:.1f} ms a token, {summary['failed']} failed, "
            f"{taken['server_cores']:.2f} cores, all others {taken['other_cores']:.2f}",
            flush=True,
        )
        return {
            "panel": "",
            "series": self.name,
            "label": self._series["label"],
            "policy": self._series["policy"],
            "x": x,
            "load": point.get("load"),
            "rate": config.rate,
            "num_requests": config.num_requests,
            "seed": config.seed,
            "run": folder.as_posix(),
            **{key: value for key, value in summary.items() if key not in ("policy", "backend")},
            **taken,
        }

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy tokens that continue each prompt, all of them asked for at once."""
        content = {
            "model": self._model,
            "prompt": prompts,
            "max_tokens": _AGREEING_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        with self.process.running():
            connection = http.client.HTTPConnection(urlsplit(self.process.url).netloc, timeout=_DRAIN_LIMIT_S)
            headers = {"Content-Type": "application/json"}
            try:
                connection.request("POST", "/v1/completions", json.dumps(content), headers)
                answer = connection.getresponse().read()
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"{self.name} does not answer: {error}") from error
            finally:
                connection.close()
        try:
            choices = sorted(json.loads(answer)["choices"], key=lambda choice: choice["index"])
            return [choice["token_ids"] for choice in choices]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{self.name} answered {message_of(answer)}") from error

    def _run(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        return run(replace(config, policy=self._series["policy"], url=self.process.url), folder)


class _Cores:
    """How many cores are busy on average, and for whom, from when this is made."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = self._seconds()

    def taken(self) -> dict[str, float]:
        """Until now: the server's, the client's, which is this process, and those of all others (in a virtual machine
        also what its host gave to somebody else)."""
        wall_s, busy_s, server_s, client_s = (
            after - before for after, before in zip(self._seconds(), self._before, strict=True)
        )
        return {
            "server_cores": server_s / wall_s,
            "client_cores": client_s / wall_s,
            "other_cores": max(0.0, busy_s - server_s - client_s) / wall_s,
        }

    def _seconds(self) -> tuple[float, ...]:
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        # A guest's time is the user's as well.
        busy_s = sum(times) - idle_s - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return time.perf_counter(), busy_s, self._server.processor_s, time.process_time()


def _ours(experiment: _Experiment, series: Mapping[str, Any], port: int) -> list[str]:
    """The command of our server: every option of the run, and of the engine and the policy what is set."""
    taken = ("device", "dtype", "load_format", "torch_threads")
    options = {"model": experiment.model, "policy": series["policy"], "port": port}
    options |= {name: experiment.run[name] for name in taken if name in experiment.run}
    command = [sys.executable, "-m", "fastserve.cli", "serve", "--no-page"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in _settings({"run": experiment.run}, series).items():
        command += ["--set", f"{name}={value}"]
    return command


def _vllm(experiment: _Experiment, series: Mapping[str, Any], port: int) -> VllmServer:
    assert experiment.vllm is not None
    options, _ = resolve_settings(series["policy"], _settings({"run": experiment.run}, series))
    assert options.num_gpu_blocks is not None
    return VllmServer(
        environment=experiment.vllm,
        model=Path(experiment.model),
        port=port,
        device=experiment.run.get("device", "cpu"),
        dtype=experiment.run.get("dtype", "float32"),
        max_batch_size=options.max_batch_size,
        token_budget=options.token_budget,
        block_size=options.block_size,
        num_blocks=options.num_gpu_blocks,
        max_model_len=options.max_model_len or experiment.model_config.max_model_len,
        chunked_prefill=VLLM[_server_of(series)],
        threads=experiment.run.get("torch_threads"),
    )


def _in_turns(
    servers: Sequence[_Server], experiment: _Experiment, point: Mapping[str, Any], rate: float
) -> list[dict[str, Any]]:
    """Rows of a point: seed by seed, each server once."""
    rows = []
    for i, seed in enumerate(experiment.seeds):
        first = i % len(servers)  # Each in turn, should who comes first have it better.
        for server in (*servers[first:], *servers[:first]):
            rows.append(server.row(point, experiment.run_config(point, rate, seed)))
    return rows


def _agreement(servers: Sequence[_Server], prompts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """A row each server: the share of answers that are the first server's, and of tokens before the first other one."""
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
    """Tokens before the first that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer, other, strict=False)))
