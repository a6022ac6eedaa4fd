"""Measure this machine: iteration times of a worker or of several ranks, what ranks tell one another, the link to the
host pools, and an engine's own time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastserve.core.checks import require_int
from fastserve.core.clock import WallClock
from fastserve.core.config import EngineOptions, ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, EngineView, Observer
from fastserve.kvcache import Direction
from fastserve.latency import (
    AllReduce,
    FittedLatency,
    HostLink,
    LatencyModel,
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
    overhead_by_batch,
    residuals,
    sample,
    times_between,
    with_overhead,
)
from fastserve.llm import LLM
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.models.source import resolve_model
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.copier import BlockCopier, make_copier
from fastserve.runtime.worker.decode_runner import graph_sizes
from fastserve.runtime.worker.devices import require_device
from fastserve.runtime.worker.probe import Probe, StageProbe
from fastserve.runtime.worker.protocol import RankConfig
from fastserve.runtime.worker.runner import Runner
from fastserve.runtime.worker.sizing import MOST_CPU_CACHE_SHARE, default_num_blocks
from fastserve.scheduler import Iteration

POLICY = "fastserve-fcfs"
"""Whose engine's time is measured: of the policies with iteration-level batches it decides the least."""
_HOST_BLOCKS = 64
_RANK_TIMEOUT_S = 30.0
_PROMPT, _FEWEST_OUTPUTS, _MORE_EACH = 32, 8, 4


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """What to measure of which model. Checked when it is measured."""

    model: str
    load_format: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    block_size: int = 16
    num_gpu_blocks: int | None = None
    """None: room for a full batch of full contexts, if memory allows."""
    num_host_blocks: int | None = None
    """None: as many as a transfer's time is measured with."""
    max_batch_size: int = 16
    token_budget: int = 2048
    repeats: int = 3
    dense: bool | None = None
    """Whether to follow a GPU's steps (`Grid.dense`); None: on a GPU."""
    quick: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage; None: as an engine divides them."""
    ranks: str | None = None
    """HOST:PORT at which to wait for ranks that torchrun starts; None: several are started here."""

    @property
    def parallel(self) -> ParallelConfig:
        """The shape of the ranks."""
        return ParallelConfig(self.tensor_parallel_size, self.pipeline_parallel_size, self.stage_layers)

    def grid(self, model: ModelConfig) -> tuple[Grid, bool]:
        """What to measure, and whether densely."""
        dense = self.device.startswith("cuda") if self.dense is None else self.dense
        if not dense:
            return Grid.for_model(model.max_model_len, self.max_batch_size, quick=self.quick), False
        sizes = graph_sizes(self.max_batch_size)
        budget = self.token_budget
        return Grid.dense(model.max_model_len, self.max_batch_size, budget, sizes, quick=self.quick), True

    @property
    def _provenance(self) -> dict[str, Any]:
        return {
            "source": "fastserve profile",
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "repeats": self.repeats,
            "max_batch_size": self.max_batch_size,
            "token_budget": self.token_budget,
            "mixed_iterations": "priced by an assumption (fastserve.latency.fitted); its error is in residuals",
        }


Begin = Callable[[int], Callable[[], None]]
"""Is told the number of steps of the long part, and returns what is called after each."""


def measure_profile(config: ProfileConfig, name: str, begin: Begin) -> Profile:
    """Make a worker, or start the ranks, and measure; the profile is called `name`.

    Every iteration's time is that of the worker for its shape and that of an engine between two of them, of which the
    latter is measured by a short run, all of whose requests are there at the start.

    Raises ConfigError for what is unknown, out of range or too large for memory, RankError if a rank is lost.
    """
    require_int("repeats", config.repeats, 1)
    require_int("num_host_blocks", config.num_host_blocks or 1, 1)
    model, model_dir = resolve_model(config.model, config.load_format)
    options = EngineOptions(
        config.max_batch_size, config.token_budget, config.block_size, config.num_gpu_blocks, config.num_host_blocks
    )
    options.scheduler_config()
    config.parallel.layers_by_stage(model)
    if config.ranks is None:
        require_device(config.device, config.parallel.world_size)
    dtype_bytes(config.dtype)
    if config.parallel.world_size == 1:
        return _measure_worker(config, model, model_dir, options, name, begin)
    return _measure_ranks(config, model, name, begin)


def _measure_worker(
    config: ProfileConfig, model: ModelConfig, model_dir: Path | None, options: EngineOptions, name: str, begin: Begin
) -> Profile:
    # The device's pool alone is measured, for as long as that takes.
    blocks = config.num_gpu_blocks or default_num_blocks(
        model, options, config.device, config.dtype, cpu_share=MOST_CPU_CACHE_SHARE
    )
    worker = Worker(
        model,
        num_gpu_blocks=blocks,
        num_host_blocks=config.num_host_blocks or min(blocks, _HOST_BLOCKS),
        block_size=config.block_size,
        device=config.device,
        dtype=config.dtype,
        model_dir=model_dir,
        max_batch_size=config.max_batch_size,
    )
    on_gpu = worker.device.type == "cuda"
    grid, dense = config.grid(model)
    shapes = grid.shapes
    measurements = measure(
        Probe(worker).iteration_time, shapes, config.repeats, begin(len(shapes) * (1 + config.repeats))
    )
    latency = fit(measurements, by_batch_size=dense, curve=dense)
    own = engine_time(config, worker, latency)
    with closing(make_copier(worker.gpu_cache, worker.host_cache, WallClock())) as copier:
        link, link_points = host_link(partial(_copy_time, copier), worker, model.kv_bytes_per_token(config.dtype))
    return Profile(
        name=name,
        model=model.name,
        hardware=torch.cuda.get_device_name(worker.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        engine="fastserve",
        dtype=config.dtype,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        stage=with_overhead(latency, own.overhead_s, own.overhead_per_request_s),
        kv_capacity_tokens=blocks * config.block_size,
        kv_bytes_per_token=model.kv_bytes_per_token(config.dtype),
        host_link=link,
        provenance=config._provenance
        | {
            "engine_time": asdict(own),
            "host_link": link_points,
            "residuals": residuals(latency, measurements),
        },
        context_tokens=model.max_model_len,
    )


def _measure_ranks(config: ProfileConfig, model: ModelConfig, name: str, begin: Begin) -> Profile:
    parallel = config.parallel
    layers = parallel.layers_by_stage(model)
    threads = max(1, torch.get_num_threads() // parallel.world_size) if config.ranks is None else None
    rank_config = RankConfig(
        model=config.model,
        load_format=config.load_format,
        device=config.device,
        dtype=config.dtype,
        block_size=config.block_size,
        max_batch_size=config.max_batch_size,
        token_budget=config.token_budget,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        stage_layers=layers,
        torch_threads=threads,
        timeout_s=_RANK_TIMEOUT_S,
    )
    with closing(
        RankGroup(
            rank_config,
            address=config.ranks,
            num_gpu_blocks=config.num_gpu_blocks,
            num_host_blocks=config.num_host_blocks or _HOST_BLOCKS,
        )
    ) as ranks:
        grid, dense = config.grid(model)
        shapes = grid.shapes
        times = sample(StageProbe(ranks).stage_times, shapes, config.repeats, begin(len(shapes) * (1 + config.repeats)))
        channel_s = statistics.median(each.channel_s for samples in times for each in samples)
        bytes_per_token = model.hidden_size * getattr(torch, config.dtype).itemsize
        most_tokens = max(sum(prompts) + len(contexts) for prompts, contexts in shapes)
        sizes = [count * bytes_per_token for count in sorted({1, 4, 16, 64, 256, most_tokens}) if count <= most_tokens]
        sums = ranks.all_reduce_times(sizes) if parallel.tensor_parallel_size > 1 else []
        sends = ranks.send_times(sizes) if parallel.pipeline_parallel_size > 1 else []
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
        link, link_points = host_link(ranks.copy_time, ranks, model.kv_bytes_per_token(config.dtype))
        blocks = ranks.num_gpu_blocks
    return Profile(
        name=name,
        model=model.name,
        hardware=_hardware(config, threads),
        engine="fastserve",
        dtype=config.dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        stage=with_overhead(pure[0], own.overhead_s + channel_s, own.overhead_per_request_s),
        later_stages=tuple(pure[1:]),
        stage_link=stage_link,
        all_reduce=all_reduce,
        context_tokens=model.max_model_len,
        kv_capacity_tokens=blocks * config.block_size,
        kv_bytes_per_token=model.kv_bytes_per_token(config.dtype),
        host_link=link,
        provenance=config._provenance
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


def _uses_gloo(config: ProfileConfig) -> bool:
    return not config.device.startswith("cuda")


def _hardware(config: ProfileConfig, threads: int | None) -> str:
    count = config.parallel.world_size
    if not _uses_gloo(config):
        return f"{count} x {torch.cuda.get_device_name() if torch.cuda.is_available() else 'GPU'}"
    return f"CPU, {count} ranks" + (f" of {threads} thread{'s' if threads > 1 else ''}" if threads else "")


def _without_all_reduces(
    stages: list[FittedLatency], all_reduce: AllReduce, shapes: Sequence[Shape]
) -> tuple[AllReduce | None, list[FittedLatency]]:
    """The stages without what `all_reduce` says of their time, so that both together are what was measured.

    Where that would leave no time for some shape, since they are quicker within an iteration than by themselves, they
    stay in the stages.
    """
    pure = []
    for i, stage in enumerate(stages):
        seconds, per_token = all_reduce.of_stage(i)
        without = stage.plus(-seconds, -per_token)
        if min(without.iteration_time(*shape) for shape in (*shapes, ((), (1,)))) <= 0:
            return None, stages
        pure.append(without)
    return all_reduce, pure


@dataclass(frozen=True, slots=True)
class EngineTime:
    """What an engine's run says beside a worker's iteration times. Of its decode iterations only."""

    policy: str
    overhead_s: float
    """From the end of an iteration to the start of the next; in every iteration of the profile."""
    overhead_per_request_s: float
    """More of that for each request."""
    iterations: int
    relative_error: float
    """Of the times fitted to the worker's, without overhead, to the engine's iterations in the sum of all."""


class _Shapes(Observer):
    """An engine's observer that writes down its iterations."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, Shape]] = []

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Add one."""
        prompts, contexts = [], []
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if request.is_decoding:
                contexts.append(request.num_computed_tokens + count)
            else:
                prompts.append(count)
        self.rows.append((start_s, end_s, (tuple(prompts), tuple(contexts))))


def engine_time(
    config: ProfileConfig,
    runner: Worker | RankGroup,
    latency: LatencyModel,
    policy: str = POLICY,
    profile: str | None = None,
) -> EngineTime:
    """Run an engine on `runner`, with requests of different lengths, so that each size of batch has its iterations.

    All fit a batch and are in it, so that in a pipeline, too, one iteration at a time is in flight; others don't count.
    `profile` is for a policy that needs one.
    """
    model, blocks = runner.model_config, runner.num_gpu_blocks
    num_requests = min(config.max_batch_size, blocks)
    # All together fit the cache: nothing is swapped or recomputed.
    longest = min(model.max_model_len, blocks // num_requests * config.block_size)
    prompt = min(_PROMPT, longest // 2, max(1, config.token_budget // num_requests))
    if not prompt:
        raise ConfigError(
            f"num_gpu_blocks={blocks} of block_size={config.block_size}: a request needs at least 2 tokens"
        )
    rows = _Shapes()
    with LLM(
        config.model,
        load_format=config.load_format,
        policy=policy,
        profile=profile,
        device=config.device,
        dtype=config.dtype,
        block_size=config.block_size,
        num_gpu_blocks=blocks,
        num_host_blocks=runner.num_host_blocks,
        max_batch_size=config.max_batch_size,
        token_budget=config.token_budget,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        stage_layers=runner.config.stage_layers if isinstance(runner, RankGroup) else None,
        worker=runner if isinstance(runner, Worker) else None,
        ranks=runner if isinstance(runner, RankGroup) else None,
    ) as llm:
        llm.engine.observer = rows
        rng, now = random.Random(0), llm.engine.clock.now()
        llm.engine.run(
            Arrival(
                Request.from_tokens(str(i), now, [rng.randrange(model.vocab_size) for _ in range(prompt)]),
                SamplingParams(max_tokens=min(longest - prompt, _FEWEST_OUTPUTS + i * _MORE_EACH), ignore_eos=True),
            )
            for i in range(num_requests)
        )
    starts, ends, shapes = zip(*rows.rows, strict=True)
    gaps = times_between(starts, ends)
    decodes = [i for i, (prompts, _) in enumerate(shapes) if not prompts and (not i or gaps[i - 1] >= 0)]
    followed = [i for i in decodes if i + 1 < len(shapes) and not shapes[i + 1][0] and gaps[i] >= 0]
    overhead_s = per_request_s = 0.0
    if followed:
        overhead_s, per_request_s = overhead_by_batch(gaps[followed], [len(shapes[i][1]) for i in followed])
    measured_s = sum(ends[i] - starts[i] for i in decodes)
    error = sum(latency.iteration_time(*shapes[i]) for i in decodes) / measured_s - 1 if decodes else 0.0
    return EngineTime(policy, overhead_s, per_request_s, len(decodes), error)


def host_link(
    copy_time: Callable[[Direction, Sequence[int]], float], runner: Runner, bytes_per_token: int, repeats: int = 5
) -> tuple[HostLink, list[dict[str, Any]]]:
    """The link between the runner's pools, and what it is fitted to: the mean of both directions, one at a time.

    Transfers of scattered blocks, since those of a request are; each point is the median of `repeats`. Of several ranks
    each copies its part, and the bytes are of all.
    """
    pools = min(runner.num_gpu_blocks, runner.num_host_blocks)
    block_bytes = runner.block_size * bytes_per_token
    order = random.Random(0).sample(range(pools), min(pools, _HOST_BLOCKS))
    points: list[dict[str, Any]] = []
    for direction in Direction:
        for count in sorted({1, min(4, len(order)), min(16, len(order)), len(order)}):
            seconds = [copy_time(direction, order[:count]) for _ in range(1 + repeats)]
            points.append(
                {"direction": direction.value, "bytes": count * block_bytes, "seconds": float(np.median(seconds[1:]))}
            )
    latency_s, bandwidth = fit_link([(point["bytes"], point["seconds"]) for point in points])
    return HostLink(bandwidth, latency_s), points


def _copy_time(copier: BlockCopier, direction: Direction, blocks: Sequence[int]) -> float:
    """Seconds in which a worker's blocks are copied between its pools."""
    began = time.perf_counter()
    copier.start(direction, blocks, blocks, None)
    while not copier.finished():
        copier.wait(float("inf"))
    return time.perf_counter() - began


def describe(profile: Profile) -> list[str]:
    """Lines for people: how well the fit describes what was measured, the engine's time, the link."""
    provenance = profile.provenance
    lines = []
    fits = [provenance["residuals"], *provenance.get("later_residuals", ())]
    for stage, of_stage in enumerate(fits):
        for kind in ("prefill", "decode", "mixed"):
            if kind in of_stage:
                errors = of_stage[kind]
                lines.append(
                    f"{kind:8} {errors['points']:3} points: relative error {errors['mean_relative_error']:.1%} on "
                    f"average, {errors['max_relative_error']:.1%} at most" + (f" (stage {stage})" if fits[1:] else "")
                )
    own = provenance["engine_time"]
    seconds, per_request = own["overhead_s"] * 1e6, own["overhead_per_request_s"] * 1e6
    lines.append(
        f"engine   {seconds:.0f} us and {per_request:.2f} us a request from one iteration to the next; its "
        f"{own['iterations']} decode iterations: relative error {own['relative_error']:+.1%} in all"
    )
    if "channel_s" in provenance:
        lines.append(f"channel  {provenance['channel_s'] * 1e6:.0f} us to tell the ranks and to hear from them")
    if provenance.get("all_reduce"):
        latency_s, bandwidth = fit_link([(each["bytes"], each["seconds"]) for each in provenance["all_reduce"]])
        where = "apart" if profile.all_reduce else "slower alone than in iterations, so in their times"
        lines.append(f"sums     {bandwidth / 1e9:.2f} GB/s, {latency_s * 1e6:.0f} us an all-reduce ({where})")
    if profile.stage_link:
        sends = profile.stage_link
        lines.append(
            f"sends    {sends.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {sends.latency_s * 1e6:.0f} us to the next stage"
        )
    link = profile.host_link
    lines.append(f"link     {link.bandwidth_bytes_per_s / 1e9:.1f} GB/s, {link.latency_s * 1e6:.0f} us a transfer")
    return lines
