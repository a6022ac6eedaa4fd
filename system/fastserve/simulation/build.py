"""Build a simulated engine: the real scheduler and cache manager on a simulated executor. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.core.clock import Clock, VirtualClock
from fastserve.core.config import CacheConfig, EngineOptions
from fastserve.engine.engine import Engine
from fastserve.kvcache import KVCacheManager
from fastserve.latency import Profile
from fastserve.policies.discovery import make_scheduler
from fastserve.simulation.executor import SimulatedExecutor
from fastserve.simulation.range_guard import RangeGuard

SWAP_SPACE_GIB_PER_GPU = 56.0
"""Host memory that each GPU swaps to if the options do not say, as in the artifact's scripts."""


def simulated_engine(
    profile: Profile,
    policy: str = "fastserve",
    policy_options: Mapping[str, Any] | None = None,
    options: EngineOptions | None = None,
    clock: Clock | None = None,
    token_ids: Sequence[int] = (),
) -> Engine:
    """An engine whose iterations take the time that `profile` says, with the cache of the profile's hardware.

    Requests are bounded by the cache, not by the model's context; set `options.max_model_len` to bound them further.

    Args:
        profile: iteration times, host link and cache of a model on some hardware.
        policy: name of the scheduling policy.
        policy_options: of the policy; None: its defaults.
        options: of the engine; None: the defaults.
        clock: a WallClock for real time, behind a server; None: virtual time.
        token_ids: in real time, the tokens that every output cycles through; empty: tokens are numbered.

    Raises:
        ConfigError: an unknown policy or option.
    """
    options = options or EngineOptions()
    if options.num_host_blocks is None and options.swap_space_gib_per_gpu is None:
        options = dataclasses.replace(options, swap_space_gib_per_gpu=SWAP_SPACE_GIB_PER_GPU)
    num_host_blocks = options.host_blocks(profile.rank_kv_bytes_per_token)
    assert num_host_blocks is not None
    cache = CacheConfig(
        num_gpu_blocks=options.num_gpu_blocks or profile.kv_capacity_tokens // options.block_size,
        num_host_blocks=num_host_blocks,
        block_size=options.block_size,
        bytes_per_token=profile.kv_bytes_per_token,
        prefix_caching=options.prefix_caching,
    )
    kv = KVCacheManager(cache)
    real_time = clock is not None
    clock = clock or VirtualClock()
    host_link = profile.host_link
    if options.host_link_gb_per_s is not None:
        host_link = dataclasses.replace(host_link, bandwidth_bytes_per_s=options.host_link_gb_per_s * 1e9)
    limits = options.scheduler_config(profile.pipeline_parallel_size)
    scheduler = make_scheduler(policy, policy_options or {}, limits, kv, profile.latency)
    executor = SimulatedExecutor(
        profile.stages,
        host_link,
        clock,
        stage_link=profile.stage_link,
        transfer_overhead_s=profile.engine_time.per_transfer_s,
        number_tokens=real_time,
        token_ids=token_ids,
        range_guard=None if profile.measured_range is None else RangeGuard(profile.measured_range),
    )
    engine = Engine(scheduler, executor, kv, clock, max_model_len=options.max_model_len)
    engine.jumps = not real_time  # A jump would report many tokens at once.
    return engine
