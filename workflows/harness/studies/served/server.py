"""A server of the study: it is started once, and runs only in its turns."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from baselines.external.environment import versions_in
from baselines.external.process import ServerProcess, free_port
from baselines.external.vllm import VllmServer
from fastserve.core.errors import ServerError
from fastserve.policies.settings import resolve_settings
from harness.client.server import contact, message_of
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.processors import machine_busy_s
from harness.studies.served.experiment import DRAIN_LIMIT_S, VLLM, ServedExperiment, kind_of
from harness.workload.arrivals import AT_ONCE

_READY_WITHIN_S = 600.0
_AGREEING_TOKENS = 32
"""Greedy tokens of each answer that is compared."""


class StudiedServer:
    """The server of a series, which runs only in its turns. Making one starts it, waits until it is ready, warms up."""

    def __init__(self, experiment: ServedExperiment, series: Mapping[str, Any], out: Path, stack: ExitStack) -> None:
        self.name: str = series["name"]
        self._series = series
        self._runs = out / "runs" / self.name
        port, log = free_port(), out / "logs" / f"{self.name}.log"
        if (kind := kind_of(series)) in VLLM:
            assert experiment.vllm is not None
            vllm = _vllm(experiment, series, port)
            packages: Mapping[str, str] | None = versions_in(experiment.vllm)
            command, variables = vllm.command(), vllm.variables()
        else:
            packages = None
            command, variables = _our_command(experiment, series, port), {}
        print(f"{series['label']}: starting, log in {log}", flush=True)
        began = time.monotonic()
        self._process = stack.enter_context(
            ServerProcess(series["label"], command, f"http://127.0.0.1:{port}", log, variables)
        )
        self._process.wait_until_ready(_READY_WITHIN_S)
        ready_s = time.monotonic() - began
        contacted = contact(self._process.url)
        self.described = {
            "series": self.name,
            "label": series["label"],
            "server": kind,
            "version": contacted.version,
            "command": command,
            "variables": variables,
            "packages": packages,
            "model": dict(contacted.card),
            "seconds_to_start": round(ready_s, 1),
        }
        """The server's entry in servers.json."""
        self._model = contacted.model
        print(f"{series['label']}: ready after {ready_s:.0f} s", flush=True)
        warm_up = experiment.run_config(experiment.points[0], AT_ONCE, max(experiment.seeds) + 1)
        with self._process.running():
            self._run(warm_up, self._runs / "warm-up")

    def row(self, point: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
        """Let the server run while it serves these requests; return the run's row of points.csv."""
        x = point.get("x", point.get("load"))
        folder = self._runs / str(x).replace(" ", "-") / f"seed-{config.seed}"
        with self._process.running():
            cores = _BusyCores(self._process)
            summary = self._run(config, folder)
            taken = cores.so_far()
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
        """Ask for greedy tokens that continue each prompt, all in one request. Raises ServerError without an answer."""
        content = {
            "model": self._model,
            "prompt": prompts,
            "max_tokens": _AGREEING_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        with self._process.running():
            connection = http.client.HTTPConnection(urlsplit(self._process.url).netloc, timeout=DRAIN_LIMIT_S)
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
        return run(replace(config, policy=self._series["policy"], url=self._process.url), folder)


class _BusyCores:
    """Counts busy cores, on average since this was made, by process."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = self._seconds()

    def so_far(self) -> dict[str, float]:
        """Cores of the server, of the client (this process), and of all others.

        In a virtual machine the others include time that its host gave to other machines.
        """
        wall_s, busy_s, server_s, client_s = (
            after - before for after, before in zip(self._seconds(), self._before, strict=True)
        )
        return {
            "server_cores": server_s / wall_s,
            "client_cores": client_s / wall_s,
            "other_cores": max(0.0, busy_s - server_s - client_s) / wall_s,
        }

    def _seconds(self) -> tuple[float, ...]:
        return time.perf_counter(), machine_busy_s(), self._server.processor_s, time.process_time()


def _our_command(experiment: ServedExperiment, series: Mapping[str, Any], port: int) -> list[str]:
    """The command of our server: the options of the run, and --set for those of the engine and the policy."""
    taken = ("device", "dtype", "load_format", "torch_threads")
    options = {"model": experiment.model, "policy": series["policy"], "port": port}
    options |= {name: experiment.run[name] for name in taken if name in experiment.run}
    command = [sys.executable, "-m", "fastserve.cli", "serve", "--no-page"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in experiment.settings_of(series).items():
        command += ["--set", f"{name}={value}"]
    return command


def _vllm(experiment: ServedExperiment, series: Mapping[str, Any], port: int) -> VllmServer:
    assert experiment.vllm is not None
    options, _ = resolve_settings(series["policy"], experiment.settings_of(series))
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
        chunked_prefill=VLLM[kind_of(series)],
        threads=experiment.run.get("torch_threads"),
    )
