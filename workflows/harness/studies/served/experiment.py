"""The experiment as configured: its servers, points, seeds and model, checked before any server is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.external.environment import python_of
from fastserve.core.checks import require_positive
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.policies.settings import resolve_settings
from harness.run.config import RunConfig
from harness.studies.model_folder import write_model_folder
from harness.workload.arrivals import AT_ONCE
from harness.workload.workload import make_workload

OURS = "fastserve"
VLLM = {"vllm": False, "vllm-chunked": True}
"""Kinds of vLLM's server, and whether each uses chunked prefill."""
DRAIN_LIMIT_S = 120.0
_WARMUP_REQUESTS = 2
"""Requests before the clock of each run starts: the server was stopped until then."""
_AGREEING_PROMPTS = 8


@dataclass(frozen=True)
class ServedExperiment:
    """The servers to compare, and what they serve."""

    series: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]
    """The first has all requests at once; the others have a load."""
    seeds: Sequence[int]
    run: Mapping[str, Any]
    model: str
    """A folder or a preset."""
    model_config: ModelConfig
    vllm: Path | None
    """The environment in which vLLM is installed."""

    @classmethod
    def of(cls, config: Mapping[str, Any], out: Path, vllm: Path | None) -> ServedExperiment:
        """Read and check an experiment; an `architecture` is written to `out`/model. Raises ConfigError."""
        first, *loaded = config["points"]
        if "load" in first or not all("load" in point for point in loaded):
            raise ConfigError(
                "the first point has no load, since its requests arrive together; every other point needs one"
            )
        for point in loaded:
            require_positive("load", point["load"])
        known = (OURS, *VLLM)
        for series in config["series"]:
            server = kind_of(series)
            if server not in known:
                raise ConfigError(f"series {series['name']!r}: unknown server {server!r}; known: {', '.join(known)}")
            if server in VLLM and (vllm is None or not python_of(vllm).exists()):
                raise ConfigError(
                    f"series {series['name']!r}: vLLM is not installed at {vllm}; `make real-vllm` installs it"
                )
            options, _ = resolve_settings(series["policy"], _settings(config["run"], series))
            if options.num_gpu_blocks is None or options.num_host_blocks is None:
                raise ConfigError("set num_gpu_blocks and num_host_blocks: all servers must have the same cache")
        model, model_config = _model(config, out)
        environment = vllm.absolute() if vllm else None
        return cls(config["series"], config["points"], config["seeds"], config["run"], model, model_config, environment)

    def settings_of(self, series: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a series: the experiment's and its own."""
        return _settings(self.run, series)

    def run_config(self, point: Mapping[str, Any], rate: float, seed: int) -> RunConfig:
        """A run of this point, without its server and policy."""
        return RunConfig(
            backend="http",
            trace=self.run["trace"],
            arrivals=self.run.get("arrivals", "poisson"),
            rate=rate,
            num_requests=point["num_requests"],
            seed=seed,
            vocab_size=self.model_config.vocab_size,
            warmup=_WARMUP_REQUESTS,
            drain_limit_s=DRAIN_LIMIT_S,
        )

    def prompts(self) -> list[list[int]]:
        """Prompts that all servers answer, to compare the answers."""
        config = self.run_config(self.points[0], AT_ONCE, self.seeds[0])
        workload = make_workload(config.trace, config.arrivals, config.rate, _AGREEING_PROMPTS, config.seed)
        return [workload.prompt_token_ids(i, self.model_config.vocab_size) for i in range(len(workload))]


def kind_of(series: Mapping[str, Any]) -> str:
    """The kind of server of a series."""
    return str(series.get("server", OURS))


def _settings(run: Mapping[str, Any], series: Mapping[str, Any]) -> dict[str, Any]:
    return {**run.get("settings", {}), **series.get("run", {}).get("settings", {})}


def _model(config: Mapping[str, Any], out: Path) -> tuple[str, ModelConfig]:
    """The model as a server is given it; an `architecture` is written to `out`/model."""
    from fastserve.runtime.models.source import resolve_model  # Imports torch.

    if "architecture" in config:
        return str(out / "model"), write_model_folder(config["architecture"], out / "model")
    if "model" not in config["run"]:
        raise ConfigError("the experiment needs an architecture, or run.model")
    model, load_format = config["run"]["model"], config["run"].get("load_format", "auto")
    return model, resolve_model(model, load_format)[0]
