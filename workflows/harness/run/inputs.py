"""The inputs of a run: its workload, and the lengths of the requests that finished before it."""

from __future__ import annotations

import numpy as np

from harness.run.config import SAME_TRACE, RunConfig
from harness.workload.traces import load_trace
from harness.workload.workload import Workload, make_workload

Lengths = list[tuple[int, int]]
"""Prompt and output tokens of requests."""


def workload_of(config: RunConfig) -> Workload:
    """Make the run's workload. Raises a FastServeError for a trace that is unknown, malformed or too short."""
    return make_workload(config.trace, config.arrivals, config.rate, config.num_requests, config.seed, config.tokenizer)


def history_of(config: RunConfig) -> Lengths:
    """Draw the lengths of the requests that finished before the run, from another random stream than the run's."""
    if config.history is None:
        return []
    rng = np.random.default_rng([config.seed, 1])
    trace = config.trace if config.history == SAME_TRACE else config.history
    prompts, outputs = load_trace(trace, config.tokenizer).sample(config.history_requests, rng)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))
