"""Time of one scheduling decision at batch 16 with 10,000 and with 100,000 requests in the system.

OPT-13B on an A100-80GB, ShareGPT lengths, all requests there from the start. The engine runs as in a simulation, in
virtual time and without jumps; the clock of these benchmarks is the time spent in `Scheduler.schedule`.

A preempting policy first computes all prompts and only then decodes, and a decision costs more while prompts
last. So both sizes are measured after the same share of the queue has passed, never after the same number of decisions,
and the tokens that a decision schedules are printed: a ratio means something only where these are alike.

A decision should take less than 100 µs with 10,000 requests, and less than 1.5 times that with 100,000.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve.core.config import EngineOptions
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Engine
from fastserve.latency import load_profile
from fastserve.scheduler import Iteration, Scheduler
from fastserve.simulation import simulated_engine
from harness.workload.workload import Workload, make_workload

FEW, MANY = 10_000, 100_000
TURNS, ROUNDS = 5, 60
"""The two sizes take turns, since the machine may be slow for longer than one measurement takes."""
TARGET_S, TARGET_RATIO = 100e-6, 1.5

AMPLE, SHORT = EngineOptions(num_gpu_blocks=10_000_000), EngineOptions()
PROMPTS, DECODING = 40, 8
"""Decisions left out: one for so many requests. After the first, the burst of promotions and of short prompts is over
and the profile's cache is full; after the second, a preempting policy has computed all prompts."""
CASES = {
    "fastserve": ("fastserve", AMPLE, PROMPTS),
    "fastserve, decoding": ("fastserve", AMPLE, DECODING),
    "fastserve, cache short": ("fastserve", SHORT, PROMPTS),
    "gittins": ("gittins", AMPLE, PROMPTS),
    "gittins, decoding": ("gittins", AMPLE, DECODING),
    "gittins, cache short": ("gittins", SHORT, PROMPTS),
    "fastserve-fcfs": ("fastserve-fcfs", AMPLE, PROMPTS),
    "mlfq": ("mlfq", AMPLE, PROMPTS),
    "srpt": ("srpt", AMPLE, PROMPTS),
    "fixed-priority": ("fixed-priority", AMPLE, PROMPTS),
    "vllm": ("vllm", AMPLE, PROMPTS),
}


class Stopwatch:
    """Seconds spent in decisions; as a timer of pytest-benchmark, all that it measures of a step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return self.seconds


class TimedScheduler(Scheduler):
    """A scheduler whose decisions the stopwatch times."""

    def schedule(self, now: float) -> Iteration:
        """Decide as the scheduler does."""
        began = time.perf_counter()
        iteration = super().schedule(now)
        stopwatch.seconds += time.perf_counter() - began
        return iteration


stopwatch = Stopwatch()
outcomes: defaultdict[str, defaultdict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
"""By case and size, of every turn: a decision's seconds and the tokens it schedules, at the median."""


@functools.cache
def workload(num_requests: int) -> Workload:
    """ShareGPT lengths."""
    return make_workload("sharegpt", "constant", 1e6, num_requests, seed=0)


@functools.lru_cache(maxsize=2)
def steady_engine(case: str, num_requests: int) -> Engine:
    """An engine with so many requests in it, past its start, its decisions timed."""
    policy, options, requests_per_decision = CASES[case]
    engine = simulated_engine(load_profile("a100-80g/opt-13b-tp1-swifttransformer"), policy, {}, options)
    engine.scheduler = TimedScheduler(engine.scheduler.policy)
    engine.jumps = False
    lengths = workload(num_requests)
    rows = zip(lengths.prompt_tokens.tolist(), lengths.output_tokens.tolist(), strict=True)
    for i, (prompt, output) in enumerate(rows):
        engine.add_request(Request(str(i), 0.0, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
    for _ in range(num_requests // requests_per_decision):
        engine.step()
    assert engine.clock.now() > 1.0, "not past the first promotions"
    return engine


@pytest.mark.benchmark(timer=stopwatch)
@pytest.mark.parametrize("num_requests", [FEW, MANY])
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.parametrize("case", CASES)
def test_decision(benchmark: Any, case: str, turn: int, num_requests: int) -> None:
    """One decision, timed in an engine that makes a step for each."""
    engine = steady_engine(case, num_requests)
    benchmark.pedantic(engine.step, rounds=ROUNDS)
    tokens = statistics.median(record.num_scheduled_tokens for record in engine.iterations[-ROUNDS:])
    outcomes[case][num_requests].append((benchmark.stats["median"], tokens))


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print all medians when they are there."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{'median of a decision':24}{FEW:>11,}{MANY:>11,}   ratio   tokens scheduled")
        for case, by_size in outcomes.items():
            if len(by_size) < 2:
                continue  # Only one size was asked for.
            (few, few_tokens), (many, many_tokens) = (
                (statistics.median(values) for values in zip(*by_size[size], strict=True)) for size in (FEW, MANY)
            )
            missed = ["time"] * (few >= TARGET_S) + ["ratio"] * (many >= TARGET_RATIO * few)
            print(
                f"{case:24}{few * 1e6:8.1f} µs{many * 1e6:8.1f} µs{many / few:8.2f}{few_tokens:10,.0f}"
                f"{many_tokens:8,.0f}{'   target missed: ' * bool(missed)}{', '.join(missed)}"
            )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "benchmark", "--benchmark-quiet", "-q", "--no-header", *sys.argv[1:]]))
