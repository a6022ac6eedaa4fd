"""Benches: the worker or the ranks on which the profiler times iterations, with the model and the cache of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from fastserve.core.config import EngineOptions, ModelConfig, dtype_bytes
from fastserve.latency import HostLink, Profile
from fastserve.latency.fitting import StageTimes, times_between
from fastserve.policies.settings import resolve_settings
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.workload.arrivals import AT_ONCE

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup

_CALIBRATION_REQUESTS = 24
_RANK_TIMEOUT_S = 30.0
_SENT_TOKENS = (4, 64)
"""Tokens whose activations the timed messages hold: a decode batch, and a prompt."""
_ANY_HOST_LINK = HostLink(1e9, 0.0)
"""Stands for the host link where there is no host pool, so nothing is copied."""


class Bench(Protocol):
    """What the profiler times."""

    model: ModelConfig
    host_link: HostLink

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Time an iteration with prompts and decodes of these lengths, in tokens."""

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """Time messages from stage to stage: bytes and seconds of each. Empty with a single stage."""

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """Measure the policy's engine: seconds from the end of an iteration to the start of the next.

        `folder` is for the files of a run.
        """

    def start_clone(self) -> AbstractContextManager[RankGroup | None]:
        """Start further ranks, equal to the timed ones, for a run. None if a run makes its own worker."""

    def frozen(self) -> AbstractContextManager[None]:
        """Stop the ranks for the duration of the context."""

    def close(self) -> None:
        """End the ranks."""


def make_bench(config: RunConfig) -> Bench:
    """A worker in this process for a single rank, else a group of ranks."""
    return WorkerBench(config) if config.parallel.world_size == 1 else RanksBench(config)


def cache_sizes(config: RunConfig) -> tuple[int, int, int]:
    """Blocks on the device, blocks on the host, and tokens of a block."""
    options, _ = resolve_settings(config.policy, config.settings)
    assert options.num_gpu_blocks is not None
    assert options.num_host_blocks is not None
    return options.num_gpu_blocks, options.num_host_blocks, options.block_size


class WorkerBench:
    """A worker in this process."""

    def __init__(self, config: RunConfig) -> None:
        from fastserve.runtime.models.source import resolve_model
        from fastserve.runtime.worker import Worker
        from fastserve.runtime.worker.devices import set_threads
        from fastserve.runtime.worker.probe import Probe, copy_bandwidth

        assert config.model is not None
        set_threads(config.torch_threads)
        num_gpu_blocks, num_host_blocks, block_size = cache_sizes(config)
        self.model, directory = resolve_model(config.model, config.load_format)
        worker = Worker(
            self.model,
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            device=config.device,
            dtype=config.dtype,
            model_dir=directory,
        )
        self._probe = Probe(worker)
        bandwidth = copy_bandwidth(worker)
        self.host_link = HostLink(bandwidth, 0.0) if bandwidth else _ANY_HOST_LINK

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Time an iteration of the only stage."""
        return StageTimes((self._probe.iteration_time(prefill_lens, context_lens),), 0.0)

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """Give no times: a single stage sends nothing."""
        return []

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """Measure it in a run of requests that arrive together, which never idles."""
        run(replace(config, rate=AT_ONCE, num_requests=_CALIBRATION_REQUESTS), folder)
        return time_between_iterations(folder)

    def start_clone(self) -> AbstractContextManager[None]:
        """Start nothing: each run makes its own worker."""
        return nullcontext()

    def frozen(self) -> AbstractContextManager[None]:
        """Stop nothing: there are no ranks."""
        return nullcontext()

    def close(self) -> None:
        """End nothing: there are no ranks."""


def time_between_iterations(folder: Path) -> float:
    """Median seconds from the end of an iteration to the start of the next, in a run of one rank that never idles."""
    iterations = pd.read_parquet(folder / "iterations.parquet", columns=["start_s", "end_s"])
    return float(np.median(times_between(iterations["start_s"].tolist(), iterations["end_s"].tolist())))


class RanksBench:
    """Ranks, each in its own process."""

    def __init__(self, config: RunConfig) -> None:
        from fastserve.profiling.links import host_link
        from fastserve.runtime.models.source import resolve_model
        from fastserve.runtime.worker.probe import StageProbe

        assert config.model is not None
        self._config = config
        self.model, _ = resolve_model(config.model, config.load_format)
        self._bytes_per_token = self.model.hidden_size * dtype_bytes(config.dtype)
        self._ranks = self._start()
        self._probe = StageProbe(self._ranks)
        num_host_blocks = self._ranks.num_host_blocks
        kv_bytes_per_token = self.model.kv_bytes_per_token(config.dtype)
        self.host_link = (
            host_link(self._ranks.copy_time, self._ranks, kv_bytes_per_token)[0] if num_host_blocks else _ANY_HOST_LINK
        )

    def _start(self) -> RankGroup:
        from fastserve.runtime.executors.ranks import RankGroup
        from fastserve.runtime.worker.protocol import RankConfig

        config = self._config
        options, _ = resolve_settings(config.policy, config.settings)
        return RankGroup(RankConfig(config.source, config.parallel, options, config.torch_threads, _RANK_TIMEOUT_S))

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Time an iteration in every stage."""
        return self._probe.stage_times(prefill_lens, context_lens)

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """Time the activations of a decode batch and of a prompt."""
        if self._config.pipeline_parallel_size == 1:
            return []
        return self._ranks.send_times([count * self._bytes_per_token for count in _SENT_TOKENS], repeats)

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """Measure it with one iteration in flight: in a full pipeline, the next starts before one has ended."""
        from fastserve.profiling.config import ProfileConfig
        from fastserve.profiling.overhead import engine_time

        options, _ = resolve_settings(config.policy, config.settings)
        sizes = EngineOptions(options.max_batch_size, options.token_budget, options.block_size)
        profile_config = ProfileConfig(config.source, sizes, parallel=config.parallel)
        own = engine_time(profile_config, self._ranks, profile.latency, config.policy, config.profile)
        return own.overhead_s + own.overhead_per_request_s * options.max_batch_size

    @contextmanager
    def start_clone(self) -> Iterator[RankGroup]:
        """Start as many further ranks, and end them with the context."""
        with closing(self._start()) as ranks:
            yield ranks

    def frozen(self) -> AbstractContextManager[None]:
        """Stop all timed ranks."""
        return self._ranks.frozen()

    def close(self) -> None:
        """End all timed ranks."""
        self._ranks.close()
