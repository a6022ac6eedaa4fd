"""Measure an engine's own time between two iterations, by a short run."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace

from fastserve.core.errors import ConfigError
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, EngineView, Observer
from fastserve.latency import LatencyModel
from fastserve.latency.fitting import Shape, overhead_by_batch, times_between
from fastserve.llm import LLM
from fastserve.profiling.config import ProfileConfig
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.worker import Worker
from fastserve.scheduler import Iteration

POLICY = "fastserve-fcfs"
"""Measured under this policy: of those with iteration-level batches it takes the least time to decide."""
_PROMPT, _FEWEST_OUTPUTS, _MORE_EACH = 32, 8, 4


@dataclass(frozen=True, slots=True)
class EngineTime:
    """An engine's own time beside a worker's iteration times, from the decode iterations of one run."""

    policy: str
    overhead_s: float
    """From the end of an iteration to the start of the next; in every iteration of the profile."""
    overhead_per_request_s: float
    """Added to `overhead_s` for each request."""
    iterations: int
    relative_error: float
    """Of the fitted times, without overhead, to the engine's iteration times, each summed over all iterations."""


class _Shapes(Observer):
    """An observer that records an engine's iterations."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, Shape]] = []

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Record the iteration."""
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
    """Run an engine on `runner`, with requests of different lengths, so that each batch size has its iterations.

    All requests are in one batch, so one iteration at a time is in flight, in a pipeline too; other iterations do not
    count. `profile` is for a policy that needs one. ConfigError if the pool on the device is too small.
    """
    model, blocks = runner.model_config, runner.num_gpu_blocks
    num_requests = min(config.engine.max_batch_size, blocks)
    # All together fit the cache: nothing is swapped or recomputed.
    longest = min(model.max_model_len, blocks // num_requests * config.engine.block_size)
    prompt = min(_PROMPT, longest // 2, max(1, config.engine.token_budget // num_requests))
    if not prompt:
        raise ConfigError(
            f"num_gpu_blocks={blocks} of block_size={config.engine.block_size}: a request needs at least 2 tokens"
        )
    rows = _Shapes()
    ranks = runner if isinstance(runner, RankGroup) else None
    sizes = replace(config.engine, num_gpu_blocks=blocks, num_host_blocks=runner.num_host_blocks)
    with LLM(
        **asdict(config.source),
        **asdict(ranks.config.parallel if ranks else config.parallel),
        **asdict(sizes),
        policy=policy,
        profile=profile,
        worker=runner if isinstance(runner, Worker) else None,
        ranks=ranks,
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
