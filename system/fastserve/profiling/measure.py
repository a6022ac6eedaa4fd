"""Measure this machine and make a profile of it.

Measured are iteration times of a worker or of several ranks, messages between ranks, the link to the host pools, and
an engine's own time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastserve.core.clock import WallClock
from fastserve.core.config import ModelConfig, dtype_bytes
from fastserve.latency import (
    AllReduce,
    FittedLatency,
    MeasuredRange,
    PipelinedLatency,
    Profile,
    StageLink,
    all_reduces,
    fit_link,
)
from fastserve.latency.fitting import (
    Grid,
    Shape,
    by_stage,
    fit,
    measure,
    residuals,
    sample,
    with_overhead,
)
from fastserve.profiling.config import TIMED_BLOCKS, ProfileConfig
from fastserve.profiling.links import copy_time, host_link
from fastserve.profiling.overhead import engine_time
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.models.source import resolve_model
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.copier import make_copier
from fastserve.runtime.worker.decode_runner import graph_sizes
from fastserve.runtime.worker.devices import require_device
from fastserve.runtime.worker.probe import Probe, StageProbe
from fastserve.runtime.worker.protocol import RankConfig
from fastserve.runtime.worker.sizing import MOST_CPU_CACHE_SHARE, default_num_blocks

_RANK_TIMEOUT_S = 30.0

Begin = Callable[[int], Callable[[], None]]
"""Takes the number of steps of the long part, and returns what to call after each step."""


def measure_profile(config: ProfileConfig, name: str, begin: Begin) -> Profile:
    """Make a worker, or start the ranks, and measure; the profile is called `name`.

    An iteration's time has two parts: that of the worker for its shape, and that of an engine until the next iteration.
    A short run measures the second part; all its requests are there at the start.

    Raises ConfigError for a value that is unknown, out of range or too large for memory, RankError if a rank is lost.
    """
    model, model_dir = resolve_model(config.source.model, config.source.load_format)
    config.parallel.layers_by_stage(model)
    if config.ranks is None:
        require_device(config.source.device, config.parallel.world_size)
    if config.parallel.world_size == 1:
        return _measure_worker(config, model, model_dir, name, begin)
    return _measure_ranks(config, model, name, begin)


def _measure_worker(
    config: ProfileConfig, model: ModelConfig, model_dir: Path | None, name: str, begin: Begin
) -> Profile:
    device, dtype, sizes = config.source.device, config.source.dtype, config.engine
    # Only the device's pool takes memory while the measurement lasts, so it may have a larger share.
    blocks = sizes.num_gpu_blocks or default_num_blocks(model, sizes, device, dtype, cpu_share=MOST_CPU_CACHE_SHARE)
    worker = Worker(
        model,
        num_gpu_blocks=blocks,
        num_host_blocks=sizes.num_host_blocks or min(blocks, TIMED_BLOCKS),
        block_size=sizes.block_size,
        device=device,
        dtype=dtype,
        seed=config.source.seed,
        model_dir=model_dir,
        max_batch_size=sizes.max_batch_size,
    )
    on_gpu = worker.device.type == "cuda"
    grid, dense = _grid(config, model)
    shapes = grid.shapes
    measurements = measure(
        Probe(worker).iteration_time, shapes, config.repeats, begin(len(shapes) * (1 + config.repeats))
    )
    latency = fit(measurements, by_batch_size=dense, curve=dense)
    own = engine_time(config, worker, latency)
    with closing(make_copier(worker.gpu_cache, worker.host_cache, WallClock())) as copier:
        link, link_points = host_link(partial(copy_time, copier), worker, model.kv_bytes_per_token(dtype))
    return Profile(
        name=name,
        model=model.name,
        hardware=torch.cuda.get_device_name(worker.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        engine="fastserve",
        dtype=dtype,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        stage=with_overhead(latency, own.overhead_s, own.overhead_per_request_s),
        kv_capacity_tokens=blocks * sizes.block_size,
        kv_bytes_per_token=model.kv_bytes_per_token(dtype),
        host_link=link,
        provenance=_provenance(config)
        | {
            "engine_time": asdict(own),
            "host_link": link_points,
            "residuals": residuals(latency, measurements),
        },
        context_tokens=model.max_model_len,
        measured_range=MeasuredRange.spanned(shapes),
        kind="fitted",
    )


def _measure_ranks(config: ProfileConfig, model: ModelConfig, name: str, begin: Begin) -> Profile:
    parallel = config.parallel
    layers = parallel.layers_by_stage(model)
    threads = max(1, torch.get_num_threads() // parallel.world_size) if config.ranks is None else None
    dtype = config.source.dtype
    engine = replace(config.engine, num_host_blocks=config.engine.num_host_blocks or TIMED_BLOCKS)
    parallel = replace(parallel, stage_layers=layers)
    rank_config = RankConfig(config.source, parallel, engine, threads, _RANK_TIMEOUT_S)
    with closing(RankGroup(rank_config, address=config.ranks)) as ranks:
        grid, dense = _grid(config, model)
        shapes = grid.shapes
        times = sample(StageProbe(ranks).stage_times, shapes, config.repeats, begin(len(shapes) * (1 + config.repeats)))
        channel_s = statistics.median(each.channel_s for samples in times for each in samples)
        bytes_per_token = model.hidden_size * dtype_bytes(dtype)
        most_tokens = max(sum(prompts) + len(contexts) for prompts, contexts in shapes)
        num_bytes = [
            count * bytes_per_token for count in sorted({1, 4, 16, 64, 256, most_tokens}) if count <= most_tokens
        ]
        sums = ranks.all_reduce_times(num_bytes) if parallel.tensor_parallel_size > 1 else []
        sends = ranks.send_times(num_bytes) if parallel.pipeline_parallel_size > 1 else []
        stage_link = StageLink(*fit_link(sends), bytes_per_token, rendezvous=_uses_gloo(config)) if sends else None
        measurements = by_stage(shapes, times, stage_link, statistics.median)
        stages = [fit(points, by_batch_size=dense, curve=dense) for points in measurements]
        all_reduce, pure = None, stages
        if sums:
            all_reduce, pure = _without_all_reduces(
                stages, AllReduce(*fit_link(sums), bytes_per_token, all_reduces(layers)), shapes
            )
        told = [with_overhead(stages[0], channel_s), *stages[1:]]
        own = engine_time(config, ranks, told[0] if stage_link is None else PipelinedLatency(tuple(told), stage_link))
        link, link_points = host_link(ranks.copy_time, ranks, model.kv_bytes_per_token(dtype))
        blocks = ranks.num_gpu_blocks
    return Profile(
        name=name,
        model=model.name,
        hardware=_hardware(config, threads),
        engine="fastserve",
        dtype=dtype,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        stage=with_overhead(pure[0], own.overhead_s + channel_s, own.overhead_per_request_s),
        later_stages=tuple(pure[1:]),
        stage_link=stage_link,
        all_reduce=all_reduce,
        context_tokens=model.max_model_len,
        measured_range=MeasuredRange.spanned(shapes),
        kind="fitted",
        kv_capacity_tokens=blocks * engine.block_size,
        kv_bytes_per_token=model.kv_bytes_per_token(dtype),
        largest_kv_bytes_per_token=parallel.rank_kv_bytes_per_token(model, dtype),
        host_link=link,
        provenance=_provenance(config)
        | {
            "stage_layers": list(layers),
            "backend": "gloo" if _uses_gloo(config) else "nccl",
            "engine_time": asdict(own),
            "channel_s": channel_s,
            "all_reduces": "not among several shards" if not sums else "apart" if all_reduce else "in the coefficients",
            "all_reduce": [{"bytes": size, "seconds": seconds} for size, seconds in sums],
            "stage_link": [{"bytes": size, "seconds": seconds} for size, seconds in sends],
            "host_link": link_points,
            "residuals": residuals(stages[0], measurements[0]),
            "later_residuals": [residuals(*each) for each in zip(stages[1:], measurements[1:], strict=True)],
        },
    )


def _grid(config: ProfileConfig, model: ModelConfig) -> tuple[Grid, bool]:
    """Return what to measure, and whether densely."""
    dense = config.source.device.startswith("cuda") if config.dense is None else config.dense
    batch, budget = config.engine.max_batch_size, config.engine.token_budget
    if not dense:
        return Grid.for_model(model.max_model_len, batch, quick=config.quick), False
    return Grid.dense(model.max_model_len, batch, budget, graph_sizes(batch), quick=config.quick), True


def _provenance(config: ProfileConfig) -> dict[str, Any]:
    return {
        "source": "fastserve profile",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "repeats": config.repeats,
        "max_batch_size": config.engine.max_batch_size,
        "token_budget": config.engine.token_budget,
        "mixed_iterations": "priced by an assumption (fastserve.latency.fitted); its error is in residuals",
    }


def _uses_gloo(config: ProfileConfig) -> bool:
    return not config.source.device.startswith("cuda")


def _hardware(config: ProfileConfig, threads: int | None) -> str:
    count = config.parallel.world_size
    if not _uses_gloo(config):
        return f"{count} x {torch.cuda.get_device_name() if torch.cuda.is_available() else 'GPU'}"
    return f"CPU, {count} ranks" + (f" of {threads} thread{'s' if threads > 1 else ''}" if threads else "")


def _without_all_reduces(
    stages: list[FittedLatency], all_reduce: AllReduce, shapes: Sequence[Shape]
) -> tuple[AllReduce | None, list[FittedLatency]]:
    """Return the all-reduces and the stages without their time; both together are what was measured.

    All-reduces may be quicker within an iteration than alone. If a stage would have no time left for some shape, they
    stay in the stages, and None is returned for them.
    """
    pure = []
    for i, stage in enumerate(stages):
        seconds, per_token = all_reduce.of_stage(i)
        without = stage.plus(-seconds, -per_token)
        if min(without.iteration_time(*shape) for shape in (*shapes, ((), (1,)))) <= 0:
            return None, stages
        pure.append(without)
    return all_reduce, pure
