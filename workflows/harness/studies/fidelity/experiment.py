"""The fidelity experiment as configured: its runs by layout of ranks, and the iterations that the profiler times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastserve.core.checks import require_positive
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from fastserve.core.parallel import ParallelConfig
from fastserve.latency.fitting import Shape
from fastserve.policies.settings import resolve_settings
from harness.run.config import RunConfig
from harness.workload.workload import make_workload


@dataclass(frozen=True)
class FidelityExperiment:
    """Series and points to measure; `config` is what all their runs have in common. Lengths are in tokens."""

    config: RunConfig
    series: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]
    max_batch_size: int
    longest_prompt: int
    longest_context: int

    @classmethod
    def of(cls, config: Mapping[str, Any], out: Path) -> FidelityExperiment:
        """Read and check an experiment; an `architecture` is written to `out`/model. Raises ConfigError."""
        fields = dict(config.get("run", {}))
        if "architecture" in config:
            fields["model"] = str(_write_model(config["architecture"], out / "model"))
        if len(config["seeds"]) != 1:
            raise ConfigError(f"the fidelity experiment takes one seed, got {list(config['seeds'])}")
        run_config = RunConfig(backend="engine", seed=config["seeds"][0], **fields)
        if run_config.model is None:
            raise ConfigError("the fidelity experiment needs run.model or an architecture")
        for point in config["points"]:
            require_positive("load", point["load"])
        for series in config["series"]:
            options, _ = resolve_settings(series["policy"], series_config(run_config, series).settings)
            if options.num_gpu_blocks is None or options.num_host_blocks is None:
                raise ConfigError(
                    "set num_gpu_blocks and num_host_blocks: the engine and the simulation must have the same cache"
                )
        num_requests = max(point["num_requests"] for point in config["points"])
        workload = make_workload(
            run_config.trace, run_config.arrivals, 1.0, num_requests, run_config.seed, run_config.tokenizer
        )
        return cls(
            config=run_config,
            series=config["series"],
            points=config["points"],
            max_batch_size=options.max_batch_size,
            longest_prompt=int(workload.prompt_tokens.max()),
            longest_context=int((workload.prompt_tokens + workload.output_tokens).max()),
        )

    @property
    def layout(self) -> ParallelConfig:
        """The layout of the ranks."""
        return self.config.parallel

    @property
    def folder_name(self) -> str:
        """The folder, below the experiment's, for what all runs of this layout share; empty for a single rank."""
        layout = self.layout
        if layout.world_size == 1:
            return ""
        return f"{layout.tensor_parallel_size}-shards-{layout.pipeline_parallel_size}-stages"

    def by_layout(self) -> Iterator[FidelityExperiment]:
        """An experiment for each layout of ranks among the series."""
        configs = [series_config(self.config, series) for series in self.series]
        for layout in dict.fromkeys(config.parallel for config in configs):
            yield replace(
                self,
                config=replace(
                    self.config,
                    tensor_parallel_size=layout.tensor_parallel_size,
                    pipeline_parallel_size=layout.pipeline_parallel_size,
                ),
                series=[
                    series for series, config in zip(self.series, configs, strict=True) if config.parallel == layout
                ],
            )

    @property
    def longest_iteration(self) -> int:
        """Most tokens that an iteration can have."""
        return self.longest_prompt + self.max_batch_size

    @property
    def shapes(self) -> list[Shape]:
        """Iterations that the profiler times: prompts up to the longest, decodes of every batch size, some mixtures."""
        prompts = sorted({max(1, round(self.longest_prompt * share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)})
        contexts = sorted({max(2, round(self.longest_context * share)) for share in (1 / 8, 3 / 8, 3 / 4)})
        most = self.max_batch_size
        shapes: list[Shape] = [((length,), ()) for length in prompts]
        shapes += [((length,) * count, ()) for length in prompts[:2] for count in (2, most) if count > 1]
        shapes += [((), (context,) * size) for size in range(1, most + 1) for context in contexts]
        shapes += [((length,), (contexts[0],) * size) for length in prompts[1:4] for size in {1, most - 1} if size]
        return shapes


def series_config(config: RunConfig, series: Mapping[str, Any]) -> RunConfig:
    """The run's configuration with the policy and the `run` of a series."""
    own = dict(series.get("run", {}))
    settings = {**config.settings, **own.pop("settings", {})}
    return replace(config, policy=series["policy"], settings=settings, **own)


def _write_model(architecture: Mapping[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as staging:
        staging.write_text(json.dumps(dict(architecture), indent=2) + "\n", encoding="utf-8")
    return folder
