"""A small latency model with round numbers, and engines in virtual time built on it."""

from collections.abc import Sequence

from fastserve.core.clock import VirtualClock
from fastserve.core.config import CacheConfig, SchedulerConfig
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, Engine
from fastserve.kvcache import KVCacheManager
from fastserve.latency import (
    DecodeFit,
    FittedLatency,
    HostLink,
    LatencyModel,
    PipelinedLatency,
    PrefillFit,
    StageLink,
)
from fastserve.policies.discovery import make_scheduler
from fastserve.scheduler import Scheduler
from fastserve.simulation import SimulatedExecutor

# A prompt token takes 1 ms; any iteration at least 10 ms; a decode step exactly that.
LATENCY = FittedLatency(PrefillFit(0.010, 0.001, 0.0), (DecodeFit(0.010, 0.0, 0.0),))
# A block of 4 tokens of 250 bytes: one block takes 1 ms each way.
LINK = HostLink(1e6, 0.0)
BYTES_PER_TOKEN = 250
# Sending takes 1 ms and 0.1 ms a token.
STAGE_LINK = StageLink(0.001, 1e6, 100)


class OpenScheduler(Scheduler):
    """A scheduler whose methods a test may replace: those of a compiled class are fixed."""


class OpenExecutor(SimulatedExecutor):
    """The same of the executor."""


def make_engine(
    policy: str,
    policy_options: dict | None = None,
    *,
    num_gpu_blocks: int = 1000,
    num_host_blocks: int = 1000,
    max_batch_size: int = 4,
    token_budget: int = 64,
    max_model_len: int | None = None,
    engine_class: type[Engine] = Engine,
    latency: LatencyModel = LATENCY,
    num_stages: int = 1,
    later_stages: Sequence[LatencyModel] | None = None,
    stage_link: StageLink = STAGE_LINK,
    prefix_caching: bool = False,
) -> Engine:
    """`latency` is that of each of `num_stages`, or of the first if `later_stages` says the others'."""
    stages = (latency, *later_stages) if later_stages else (latency,) * num_stages
    kv = KVCacheManager(CacheConfig(num_gpu_blocks, num_host_blocks, 4, BYTES_PER_TOKEN, prefix_caching))
    clock = VirtualClock()
    config = SchedulerConfig(max_batch_size, token_budget, len(stages))
    whole = latency if len(stages) == 1 else PipelinedLatency(stages, stage_link)
    scheduler = OpenScheduler(make_scheduler(policy, policy_options or {}, config, kv, whole).policy)
    executor = OpenExecutor(stages, LINK, clock, stage_link=stage_link)
    return engine_class(scheduler, executor, kv, clock, max_model_len=max_model_len)


def arrival(name: str, at: float, prompt: int, output: int) -> Arrival:
    return Arrival(Request(name, at, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
