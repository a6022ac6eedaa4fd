"""Measure this machine: iteration times of a worker, the link to its host pool, and an engine's own time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from fastserve.clock import WallClock
from fastserve.config import EngineOptions, require_int
from fastserve.engine import Arrival, Engine, Observer
from fastserve.errors import ConfigError
from fastserve.kvcache import Direction
from fastserve.latency import HostLink, LatencyModel, Profile, fit_link
from fastserve.latency.profiler import (
    Grid,
    Shape,
    fit,
    measure,
    overhead_by_batch,
    residuals,
    times_between,
    with_overhead,
)
from fastserve.llm import LLM, resolve_model
from fastserve.request import Request, SamplingParams
from fastserve.scheduler import Iteration
from fastserve.worker import Worker
from fastserve.worker.copier import make_copier
from fastserve.worker.decode_runner import graph_sizes
from fastserve.worker.probe import Probe
from fastserve.worker.sizing import default_num_blocks

POLICY = "fastserve-fcfs"
"""Whose engine's time is measured: of the policies with iteration-level batches it decides the least."""
_HOST_BLOCKS = 64
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


def measure_profile(config: ProfileConfig, name: str, begin: Callable[[int], Callable[[], None]]) -> Profile:
    """Make a worker and measure it; the profile is called `name`.

    Every iteration's time is that of the worker for its shape and that of an engine between two of them, of which the
    latter is measured by a short run, all of whose requests are there at the start. `begin` is told the number of steps
    of the long part and returns what is called after each.

    Raises ConfigError for what is unknown, out of range or too large for memory.
    """
    require_int("repeats", config.repeats, 1)
    require_int("num_host_blocks", config.num_host_blocks or 1, 1)
    model, model_dir = resolve_model(config.model, config.load_format)
    options = EngineOptions(
        config.max_batch_size, config.token_budget, config.block_size, config.num_gpu_blocks, config.num_host_blocks
    )
    options.scheduler_config()
    blocks = config.num_gpu_blocks or default_num_blocks(model, options, config.device, config.dtype)
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
    dense = on_gpu if config.dense is None else config.dense
    if dense:
        sizes = graph_sizes(config.max_batch_size)
        grid = Grid.dense(model.max_model_len, config.max_batch_size, config.token_budget, sizes, quick=config.quick)
    else:
        grid = Grid.for_model(model.max_model_len, config.max_batch_size, quick=config.quick)
    shapes = grid.shapes
    measurements = measure(
        Probe(worker).iteration_time, shapes, config.repeats, begin(len(shapes) * (1 + config.repeats))
    )
    latency = fit(measurements, by_batch_size=dense, curve=dense)
    own = engine_time(config, worker, latency)
    link, link_points = host_link(worker)
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
        provenance={
            "source": "fastserve profile",
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "repeats": config.repeats,
            "max_batch_size": config.max_batch_size,
            "token_budget": config.token_budget,
            "mixed_iterations": "priced by an assumption (fastserve.latency.fitted); its error is in residuals",
            "engine_time": asdict(own),
            "host_link": link_points,
            "residuals": residuals(latency, measurements),
        },
    )


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

    def on_iteration(self, engine: Engine, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Add one."""
        prompts, contexts = [], []
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if request.is_decoding:
                contexts.append(request.num_computed_tokens + count)
            else:
                prompts.append(count)
        self.rows.append((start_s, end_s, (tuple(prompts), tuple(contexts))))


def engine_time(config: ProfileConfig, worker: Worker, latency: LatencyModel) -> EngineTime:
    """Run an engine on `worker`, with requests of different lengths, so that each size of batch has its iterations."""
    blocks = worker.gpu_cache.shape[0]
    num_requests = min(config.max_batch_size, blocks)
    # All together fit the cache: nothing is swapped or recomputed.
    longest = min(worker.model.config.max_model_len, blocks // num_requests * config.block_size)
    prompt = min(_PROMPT, longest // 2)
    if not prompt:
        raise ConfigError(
            f"num_gpu_blocks={blocks} of block_size={config.block_size}: a request needs at least 2 tokens"
        )
    rows = _Shapes()
    with LLM(
        config.model,
        load_format=config.load_format,
        policy=POLICY,
        device=config.device,
        dtype=config.dtype,
        block_size=config.block_size,
        num_gpu_blocks=blocks,
        num_host_blocks=worker.host_cache.shape[0],
        max_batch_size=config.max_batch_size,
        token_budget=config.token_budget,
        worker=worker,
    ) as llm:
        llm.engine.observer = rows
        rng, now = random.Random(0), llm.engine.clock.now()
        llm.engine.run(
            Arrival(
                Request.from_tokens(
                    str(i), now, [rng.randrange(worker.model.config.vocab_size) for _ in range(prompt)]
                ),
                SamplingParams(max_tokens=min(longest - prompt, _FEWEST_OUTPUTS + i * _MORE_EACH), ignore_eos=True),
            )
            for i in range(num_requests)
        )
    starts, ends, shapes = zip(*rows.rows, strict=True)
    decodes = [i for i, (prompts, _) in enumerate(shapes) if not prompts]
    gaps = times_between(starts, ends)
    followed = [i for i in decodes if i + 1 < len(shapes) and not shapes[i + 1][0]]
    overhead_s = per_request_s = 0.0
    if followed:
        overhead_s, per_request_s = overhead_by_batch(gaps[followed], [len(shapes[i][1]) for i in followed])
    measured_s = sum(ends[i] - starts[i] for i in decodes)
    error = sum(latency.iteration_time(*shapes[i]) for i in decodes) / measured_s - 1 if decodes else 0.0
    return EngineTime(POLICY, overhead_s, per_request_s, len(decodes), error)


def host_link(worker: Worker, repeats: int = 5) -> tuple[HostLink, list[dict[str, Any]]]:
    """The link between the worker's pools, and what it is fitted to: the mean of both directions, one at a time.

    Transfers of scattered blocks, since those of a request are; each point is the median of `repeats`.
    """
    pools = min(worker.gpu_cache.shape[0], worker.host_cache.shape[0])
    clock = WallClock()
    copier = make_copier(worker.gpu_cache, worker.host_cache, clock)
    block_bytes = worker.gpu_cache[0].nbytes
    order = random.Random(0).sample(range(pools), min(pools, _HOST_BLOCKS))
    points: list[dict[str, Any]] = []
    for direction in Direction:
        for count in sorted({1, min(4, len(order)), min(16, len(order)), len(order)}):
            seconds = []
            for _ in range(1 + repeats):
                began = time.perf_counter()
                copier.start(direction, order[:count], order[:count], None)
                while not copier.finished():
                    copier.wait(float("inf"))
                seconds.append(time.perf_counter() - began)
            points.append(
                {"direction": direction.value, "bytes": count * block_bytes, "seconds": float(np.median(seconds[1:]))}
            )
    copier.close()
    latency_s, bandwidth = fit_link([(point["bytes"], point["seconds"]) for point in points])
    return HostLink(bandwidth, latency_s), points


def describe(profile: Profile) -> list[str]:
    """Lines for people: how well the fit describes what was measured, the engine's time, the link."""
    provenance = profile.provenance
    lines = []
    for kind in ("prefill", "decode", "mixed"):
        if kind in provenance["residuals"]:
            errors = provenance["residuals"][kind]
            lines.append(
                f"{kind:8} {errors['points']:3} points: relative error {errors['mean_relative_error']:.1%} on average, "
                f"{errors['max_relative_error']:.1%} at most"
            )
    own = provenance["engine_time"]
    seconds, per_request = own["overhead_s"] * 1e6, own["overhead_per_request_s"] * 1e6
    lines.append(
        f"engine   {seconds:.0f} us and {per_request:.2f} us a request from one iteration to the next; its "
        f"{own['iterations']} decode iterations: relative error {own['relative_error']:+.1%} in all"
    )
    link = profile.host_link
    lines.append(f"link     {link.bandwidth_bytes_per_s / 1e9:.1f} GB/s, {link.latency_s * 1e6:.0f} us a transfer")
    return lines
