"""The range guard: how much of a simulation's time lies outside its profile's range, stepped or jumped."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine import Engine
from fastserve.latency import DecodeFit, FittedLatency, MeasuredRange, OutsideRange, PrefillFit
from fastserve.scheduler import Iteration
from fastserve.simulation.range_guard import RangeGuard
from support.engines import OpenExecutor, arrival, make_engine

LATENCY = FittedLatency(PrefillFit(0.0113, 1.7e-4, 1.1e-7), (DecodeFit(0.0101, 1.3e-5, 1.7e-4),))
NAMES = ("iteration_tokens", "prompt_tokens", "decodes", "context_tokens")
Jobs = list[tuple[float, int, int]]
"""Arrival (s), prompt and output tokens of requests."""


def engine_of(policy: str, measured: MeasuredRange, *, jumps: bool = True, **sizes: int) -> tuple[Engine, RangeGuard]:
    engine = make_engine(policy, latency=LATENCY, **sizes)
    engine.jumps = jumps
    assert isinstance(engine.executor, OpenExecutor)
    guard = engine.executor.range_guard = RangeGuard(measured)
    return engine, guard


def serve(engine: Engine, jobs: Jobs) -> None:
    engine.run(arrival(str(i), at, prompt, output) for i, (at, prompt, output) in enumerate(jobs))


class OneByOne:
    """The truth: sizes and seconds of each iteration that an engine submits."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[tuple[dict[str, int], float]] = []
        self._submit = engine.executor.submit
        engine.executor.submit = self.submit  # type: ignore[method-assign]

    def submit(self, iteration: Iteration) -> None:
        rows = [
            (request.num_computed_tokens, count)
            for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
        ]
        prompts = [(before, count) for before, count in rows if count > 1 or not before]
        contexts = [before + count for before, count in rows if count == 1 and before]
        sizes = (sum(n for _, n in rows), max(map(sum, prompts), default=0), len(contexts), max(contexts, default=0))
        seconds = LATENCY.iteration_time([n for _, n in prompts], contexts, [before for before, _ in prompts])
        self.seen.append((dict(zip(NAMES, sizes, strict=True)), seconds))
        self._submit(iteration)

    def outside(self, measured: MeasuredRange) -> tuple[float, dict[str, dict[str, int]]]:
        """Share of the time, and how far each bound was left."""
        limits = {name: bound for name, bound in zip(NAMES, astuple(measured), strict=True) if bound is not None}
        reached: dict[str, int] = {}
        outside_s = 0.0
        for sizes, seconds in self.seen:
            left = {name: sizes[name] for name, limit in limits.items() if sizes[name] > limit}
            outside_s += seconds if left else 0.0
            reached |= {name: max(size, reached.get(name, 0)) for name, size in left.items()}
        bounds_left = {name: {"measured": limits[name], "reached": size} for name, size in reached.items()}
        return outside_s / sum(seconds for _, seconds in self.seen), bounds_left


bounds = st.none() | st.integers(1, 90)
ranges = st.builds(MeasuredRange, bounds, bounds, st.none() | st.integers(1, 5), bounds)
requests = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=8)


@given(ranges, requests, st.sampled_from(["fastserve", "vllm-chunked", "vllm", "fastserve-fcfs"]), st.integers(40, 200))
def test_jumps_and_steps_count_the_same_time(measured: MeasuredRange, jobs: Jobs, policy: str, blocks: int) -> None:
    jumping, jumped = engine_of(policy, measured, num_gpu_blocks=blocks)
    stepping, stepped = engine_of(policy, measured, jumps=False, num_gpu_blocks=blocks)
    one_by_one = OneByOne(stepping)
    serve(jumping, jobs)
    serve(stepping, jobs)
    share, bounds_left = one_by_one.outside(measured)
    assert jumped.computed_s == pytest.approx(stepped.computed_s)
    for outside in (stepped.outside, jumped.outside):
        assert outside.share == pytest.approx(share, abs=1e-9)
        assert outside.bounds_left == bounds_left


def test_padding_counts() -> None:
    # Each row of a padded batch is computed as the longest.
    engine, guard = engine_of("run-to-completion", MeasuredRange(iteration_tokens=59), max_model_len=100)
    serve(engine, [(0.0, 30, 1), (0.0, 4, 1)])
    assert guard.outside == OutsideRange(1.0, {"iteration_tokens": {"measured": 59, "reached": 60}})


def test_a_run_inside_its_range_is_not_outside() -> None:
    # The longest context is 50 + 20 - 1: the last token is never fed back.
    jobs = [(0.0, 50, 20), (0.0, 10, 30)]
    engine, guard = engine_of("fastserve-fcfs", MeasuredRange(60, 50, 2, 69))
    serve(engine, jobs)
    assert guard.computed_s > 0
    assert guard.outside == OutsideRange(0.0, {})
    engine, guard = engine_of("fastserve-fcfs", MeasuredRange(60, 50, 2, 68))
    serve(engine, jobs)
    assert 0 < guard.outside.share < 1
    assert guard.outside.bounds_left == {"context_tokens": {"measured": 68, "reached": 69}}


def test_without_an_iteration_nothing_is_outside() -> None:
    assert RangeGuard(MeasuredRange(1, 1, 1, 1)).outside == OutsideRange(0.0, {})


def test_the_warning_says_how_much_how_far_and_what_to_do() -> None:
    left = {
        "prompt_tokens": {"measured": 2048, "reached": 120_000},
        "decodes": {"measured": 64, "reached": 65},
        "context_tokens": {"measured": 1024, "reached": 121_000},
    }
    assert OutsideRange(0.934, left).warning("a/b") == (
        "93 % of the computed time lies outside the range that profile a/b holds for, and is extrapolated: prompts of "
        "120,000 tokens (range to 2,048), 65 decodes at a time (range to 64), contexts of 121,000 tokens (range to "
        "1,024); take a profile with a larger range (`fastbench profiles` shows them), or requests of at most 1,024 "
        "tokens and a max_batch_size of at most 64"
    )
    assert OutsideRange(0.0, {}).warning("a/b") == ""
