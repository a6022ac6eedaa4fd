"""Iterations that can only be alike are computed at once. That must leave no trace: the same bytes as one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.options import option_names
from fastserve.latency import DecodeFit, FittedLatency, LatencyModel, PrefillFit, decode_times
from fastserve.policies.discovery import find_policy, list_policies
from support.engines import arrival, make_engine
from support.profiles import share

# Powers of two add up without rounding, so that arrivals, promotions and quanta can fall on the very end of an
# iteration: 8 ms (1/128 s) a decode step.
EVEN = FittedLatency(PrefillFit(1 / 128, 1 / 1024, 0.0), (DecodeFit(1 / 128, 0.0, 0.0),))
# Here no sum is exact, every step is longer than the last, and the fit changes with the batch.
UNEVEN = FittedLatency(
    PrefillFit(0.0113, 0.00017, 1.1e-7),
    (DecodeFit(0.0101, 1.3e-5, 1.7e-4, 2), DecodeFit(0.0097, 1.1e-5, 3.1e-4)),
)
LATENCIES = {"even": EVEN, "uneven": UNEVEN}

CASES = sorted(
    (name, swap)
    for name, cls in list_policies().items()
    for swap in ("proactive", "reactive", "recompute", "none")
    if ("swap" in option_names(cls.Options) or swap == "none")
    and not (name == "vllm" and swap in ("proactive", "none"))
)


class Outcome(NamedTuple):
    iterations: list[str]
    jobs: list[str]
    num_decisions: int


OPTIONS = (
    *("alpha_s", "quantum_base_s", "reserve", "starvation_check_every", "first_iteration"),
    *("objective", "exponent", "memory_requests"),
    *("v1", "watermark"),
)


def run(
    policy: str, swap: str, jobs: list[tuple[str, float, int, int]], *, jumps: bool, latency: str, **how
) -> Outcome:
    known = option_names(find_policy(policy).Options)
    given = {"swap": swap, **{name: value for name, value in how.items() if name in OPTIONS}}
    sizes = {name: value for name, value in how.items() if name not in OPTIONS}
    options = {name: value for name, value in given.items() if name in known}
    engine = make_engine(policy, options, latency=LATENCIES[latency], **sizes)
    engine.jumps = jumps
    schedule, num_decisions = engine.scheduler.schedule, 0

    def counted(now: float) -> object:
        nonlocal num_decisions
        num_decisions += 1
        return schedule(now)

    engine.scheduler.schedule = counted
    done = engine.run([arrival(*job) for job in jobs])
    engine.kv.check_invariants()
    assert engine.kv.num_free_gpu_blocks == engine.kv.config.num_gpu_blocks
    # repr() tells floats apart that print alike, numpy's from Python's, and one NaN is as good as another.
    return Outcome([repr(record) for record in engine.iterations], [repr(job.metrics) for job in done], num_decisions)


def compare(policy: str, swap: str, jobs: list[tuple[str, float, int, int]], latency: str, **sizes) -> Outcome:
    """Run both ways, and return what came of the jumps."""
    at_once = run(policy, swap, jobs, jumps=True, latency=latency, **sizes)
    one_by_one = run(policy, swap, jobs, jumps=False, latency=latency, **sizes)
    assert at_once.iterations == one_by_one.iterations
    assert at_once.jobs == one_by_one.jobs
    assert at_once.num_decisions <= one_by_one.num_decisions
    return at_once


PATTERNS = {
    "at once": [(f"{i}", 0.0, 5 + 3 * i, 70 - 8 * i) for i in range(6)],
    # 26 / 1024 s apart: within iterations; 2 / 128: at their ends.
    "in the middle": [(f"{i}", 26 / 1024 * i * i, 6 + i, 50) for i in range(7)],
    "at the ends": [(f"{i}", 2 / 128 * i * i, 7, 45) for i in range(7)],
    "far apart": [(f"{i}", 1.0 * i, 12, 60) for i in range(3)],
    "bursts": [(f"{i}", i // 4 / 2, 3 + 9 * (i % 3), 15 + 20 * (i % 2)) for i in range(9)],
}
SIZES = {
    "ample": {"num_gpu_blocks": 1000, "max_batch_size": 4},
    "short": {"num_gpu_blocks": 30, "num_host_blocks": 100, "max_batch_size": 4},
    "very short": {"num_gpu_blocks": 21, "num_host_blocks": 24, "max_batch_size": 2},
    "no host": {"num_gpu_blocks": 26, "num_host_blocks": 0, "max_batch_size": 3},
    "found again": {"num_gpu_blocks": 32, "num_host_blocks": 0, "max_batch_size": 3, "prefix_caching": True},
}


@pytest.mark.parametrize(("policy", "swap"), CASES)
@pytest.mark.parametrize("latency", LATENCIES)
def test_jumps_leave_no_trace(policy: str, swap: str, latency: str) -> None:
    for jobs, sizes in itertools.product(PATTERNS.values(), SIZES.values()):
        outcome = compare(policy, swap, jobs, latency, **sizes)
        if policy == "fastserve-fcfs" and sizes["num_gpu_blocks"] == 1000:
            assert outcome.num_decisions < len(outcome.iterations) / 2


@pytest.mark.parametrize("alpha", [0.125, 0.3])
@pytest.mark.parametrize("base", [1 / 128, 0.1])
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("policy", ["fastserve", "mlfq", "fastserve-artifact"])
def test_quanta_and_promotions_in_the_middle(policy: str, latency: str, base: float, alpha: float) -> None:
    for jobs, sizes in itertools.product(PATTERNS.values(), SIZES.values()):
        compare(policy, "proactive", jobs, latency, alpha_s=alpha, quantum_base_s=base, **sizes)


def test_a_jump_ends_where_a_quantum_is_used_up() -> None:
    # Quanta of 1/4, 1/2, 1 s and one place. a and b join level 0: prompts of 16/1024 + 1/128 = 3/128 s, then steps of
    # 1/128: 29 until the first quantum is used up, 64 for the second, and 106 of the 128 of the third.
    jobs = [("a", 0.0, 16, 200), ("b", 0.0, 16, 200)]
    outcome = compare("fastserve", "proactive", jobs, "even", quantum_base_s=0.25, alpha_s="none", max_batch_size=1)
    assert len(outcome.iterations) == 400
    # For each: the prompt, the 29, the 64, 105, and the last token, which no jump computes. And a decision that
    # preempts is carried out by itself: when a takes over in level 1, b after it, and a in level 2.
    assert outcome.num_decisions == 2 * 5 + 3


def test_a_jump_ends_where_someone_is_promoted() -> None:
    # a's first iteration takes 3/128 s, b's 13.5/128: levels 0 and 2, of 6/128, 12/128 and 24/128 s. b waits in level 2
    # until it is promoted, at the very end of one of a's iterations (1/8 s) or within one; a has then got to level 2.
    jobs = [("a", 0.0, 16, 100), ("b", 0.0, 100, 50)]
    for alpha in (0.125, 0.13):
        options = {"quantum_base_s": 6 / 128, "alpha_s": alpha, "max_batch_size": 1}
        outcome = compare("fastserve", "none", jobs, "even", **options)
        assert f"first_scheduled_s={(16 if alpha == 0.125 else 17) / 128}," in outcome.jobs[1]
        assert outcome.num_decisions < len(outcome.iterations) / 4


@pytest.mark.parametrize("policy", ["fastserve", "fastserve-artifact"])
@pytest.mark.parametrize("every", [7, 20])
def test_a_jump_ends_where_it_is_time_to_look_who_is_starved(policy: str, every: int) -> None:
    # a decodes from level 1 on, b waits below it until a decision looks. An iteration jumped over was a decision too.
    jobs = [("a", 0.0, 4, 60), ("b", 0.0, 60, 20)]
    options = {"starvation_check_every": every, "first_iteration": "profiled", "quantum_base_s": 0.02}
    for swap in ("none", "proactive"):
        outcome = compare(policy, swap, jobs, "even", alpha_s=0.1, max_batch_size=1, **options)
        assert outcome.num_decisions < len(outcome.iterations)


def test_a_jump_ends_before_an_arrival() -> None:
    # a's prompt ends at 3/128, and its steps at 4/128, 5/128, ... b comes at the end of one, or within one; either way
    # it is first scheduled where the next decision falls.
    for at, first in ((20 / 128, 20 / 128), (20.5 / 128, 21 / 128)):
        jobs = [("a", 0.0, 16, 100), ("b", at, 16, 100)]
        outcome = compare("fastserve-fcfs", "none", jobs, "even")
        assert f"first_scheduled_s={first!r}" in outcome.jobs[1]
        # a's prompt, until b comes, b's prompt, until a's last token but one, that, and the same for b.
        assert outcome.num_decisions == 7


def test_a_jump_ends_where_growth_fails() -> None:
    # Two of 4 + 60 tokens, 16 blocks each, in 20: the later one loses its cache on the way.
    jobs = [("a", 0.0, 4, 60), ("b", 0.0, 4, 60)]
    for swap in ("proactive", "reactive", "recompute", "none"):
        outcome = compare("fastserve-fcfs", swap, jobs, "even", num_gpu_blocks=20)
        assert outcome.num_decisions < len(outcome.iterations)


# -- an index that rises with age --------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", ["proactive", "reactive", "recompute", "none"])
def test_gittins_jumps_while_requests_wait(swap: str) -> None:
    # Prompts of 100 tokens, with outputs of 200, wait behind two that are found to be as long and are older.
    jobs = [(f"{i}", 0.01 * i, 100, 200) for i in range(8)]
    outcome = compare("gittins", swap, jobs, "uneven", alpha_s="none", max_batch_size=2, num_gpu_blocks=10_000)
    assert outcome.num_decisions < len(outcome.iterations) / 4


def test_gittins_jumps_while_caches_are_swapped_out() -> None:
    jobs = [(f"{i}", 0.2 * i, 20 + 7 * i, 100) for i in range(12)]
    sizes = {"num_gpu_blocks": 90, "num_host_blocks": 500, "max_batch_size": 2}
    outcome = compare("gittins", "proactive", jobs, "uneven", alpha_s="none", **sizes)
    assert outcome.num_decisions < len(outcome.iterations) * 3 / 4


def test_gittins_stops_a_jump_where_a_waiting_request_starves() -> None:
    # One place: b waits for alpha, runs one iteration, and waits again.
    jobs = [("a", 0.0, 16, 200), ("b", 0.0, 16, 200)]
    outcome = compare("gittins", "proactive", jobs, "even", alpha_s=0.125, max_batch_size=1)
    assert outcome.num_decisions < len(outcome.iterations) * 2 / 3
    # More starved requests than places do not come first.
    jobs = [(f"{i}", i / 64, 16, 200) for i in range(4)]
    outcome = compare("gittins", "proactive", jobs, "even", alpha_s=0.125, max_batch_size=1)
    assert outcome.num_decisions < len(outcome.iterations) / 2


@share(1 / 25)
@given(
    swap=st.sampled_from(["proactive", "reactive", "recompute", "none"]),
    latency=st.sampled_from(sorted(LATENCIES)),
    jobs=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(20, 200)), min_size=3, max_size=12),
    num_gpu_blocks=st.integers(60, 400),
    num_host_blocks=st.sampled_from([0, 60, 1000]),
    max_batch_size=st.integers(1, 3),
    alpha_s=st.sampled_from(["none", 0.125, 0.3]),
    reserve=st.sampled_from(["history", "batch", "none"]),
    objective=st.sampled_from(["slowdown", "jct"]),
    exponent=st.sampled_from(["none", 1.0, 1.5, 5.0]),
    memory_requests=st.sampled_from([3.0, 1000.0]),
)
def test_gittins_leaves_no_trace_of_jumps_while_requests_wait(
    swap: str, latency: str, jobs: list[tuple[int, int, int]], **sizes
) -> None:
    at, arrivals = 0.0, []
    for i, (gap, prompt, output) in enumerate(jobs):
        at += gap / 256
        arrivals.append((f"{i}", at, prompt, output))
    compare("gittins", swap, arrivals, latency, **sizes)


# -- any policy --------------------------------------------------------------------------------------------------------


@share(1 / 5)
@given(
    case=st.sampled_from(CASES),
    latency=st.sampled_from(sorted(LATENCIES)),
    jobs=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=8),
    num_gpu_blocks=st.integers(20, 200),
    num_host_blocks=st.integers(0, 120),
    max_batch_size=st.integers(1, 5),
    token_budget=st.integers(1, 64),
    alpha_s=st.sampled_from(["none", 0.125, 0.3]),
    quantum_base_s=st.sampled_from([1 / 128, 0.1, 1.0]),
    reserve=st.sampled_from(["history", "batch", "none"]),
    starvation_check_every=st.sampled_from([1, 10, 100]),
)
def test_jumps_leave_no_trace_in_generated_scenarios(
    case: tuple[str, str], latency: str, jobs: list[tuple[int, int, int]], **sizes
) -> None:
    at, arrivals = 0.0, []
    for i, (gap, prompt, output) in enumerate(jobs):
        at += gap / 256  # Half the time at the end of an even iteration.
        arrivals.append((f"{i}", at, prompt, output))
    compare(*case, arrivals, latency, **sizes)


@share(1 / 25)
@given(
    jobs=st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 40), st.integers(100, 400)), min_size=1, max_size=6),
    latency=st.sampled_from(sorted(LATENCIES)),
)
def test_long_outputs_are_jumped_over(jobs: list[tuple[float, int, int]], latency: str) -> None:
    at, arrivals = 0.0, []
    for i, (gap, prompt, output) in enumerate(jobs):
        at += gap
        arrivals.append((f"{i}", at, prompt, output))
    outcome = compare("fastserve-fcfs", "none", arrivals, latency)
    # A few decisions for each that comes and goes, and none for the hundred tokens in between.
    assert outcome.num_decisions <= 12 * len(jobs) < len(outcome.iterations)


# -- the times of many decode steps --------------------------------------------------------------------------------

_seconds = st.floats(0, 0.1, allow_subnormal=False)
fits = st.builds(DecodeFit, _seconds, st.floats(0, 1e-3, allow_subnormal=False), st.floats(0, 1e-2), st.none())
bounded = st.builds(DecodeFit, _seconds, st.floats(0, 1e-3), st.floats(0, 1e-2), st.integers(1, 8))


@share(1 / 10)
@given(bounded, fits, st.lists(st.integers(1, 100_000), min_size=1, max_size=32), st.integers(0, 200))
def test_decode_times_are_iteration_times_to_the_bit(
    small: DecodeFit, large: DecodeFit, contexts: list[int], count: int
) -> None:
    latency = FittedLatency(PrefillFit(0.01, 0.001, 0.0), (small, large))
    times = latency.decode_times(contexts, count)
    one_by_one = [latency.iteration_time((), [length + step for length in contexts]) for step in range(count)]
    assert times.dtype == np.float64
    assert times.tolist() == one_by_one
    assert decode_times(latency, contexts, count).tolist() == one_by_one


class Measured:
    """A latency model that does not say how long many steps take."""

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        return 0.01 + 0.0003 * sum(decode_context_lens) ** 0.5 + 0.001 * sum(prefill_lens)


def test_a_model_without_decode_times_is_asked_one_by_one() -> None:
    model: LatencyModel = Measured()
    times = decode_times(model, [5, 9], 3)
    assert times.tolist() == [model.iteration_time((), lens) for lens in ([5, 9], [6, 10], [7, 11])]
    assert decode_times(model, [5], 0).tolist() == []
    assert decode_times(EVEN, [5], 0).tolist() == []


def test_engines_jump_with_such_a_model_too() -> None:
    LATENCIES["measured"] = Measured()
    try:
        outcome = compare("fastserve-fcfs", "none", PATTERNS["in the middle"], "measured")
        assert outcome.num_decisions < len(outcome.iterations) / 4
    finally:
        del LATENCIES["measured"]


def test_a_chunk_of_one_token_is_no_decoding() -> None:
    """Recomputed a token at a time beside others that decode: all take one token, and not all produce one."""
    runs = []
    for jumps in (True, False):
        engine = make_engine("vllm-chunked", {"chunk_tokens": 2}, num_gpu_blocks=13)
        engine.jumps = jumps
        jobs = engine.run([arrival("a", 0.0, 20, 17), arrival("b", 0.07, 4, 20), arrival("c", 0.02, 23, 23)])
        assert sum(job.recomputed_tokens for job in jobs) > 0
        runs.append((engine.iterations, [repr(job.metrics) for job in jobs]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("latency", LATENCIES)
def test_jumps_leave_no_trace_where_dropped_caches_are_found_again(latency: str) -> None:
    options = {"v1": True, "watermark": 0.0, "prefix_caching": True}
    found = 0
    for jobs, (blocks, batch) in itertools.product(PATTERNS.values(), [(30, 4), (21, 2), (26, 3)]):
        sizes = {"num_gpu_blocks": blocks, "max_batch_size": batch, "token_budget": 24}
        outcome = compare("vllm-chunked", "none", jobs, latency, **options, **sizes)
        found += sum("cached_tokens=0," not in job for job in outcome.jobs)
        assert outcome.num_decisions < len(outcome.iterations)
    assert found > 0


def test_a_resume_with_one_token_to_compute_is_counted() -> None:
    """All but one token is found, so that the iteration looks like those that jumps pass over."""
    jobs = [("a", 0.0, 1, 44), ("b", 0.05, 6, 49)]
    options = {"v1": True, "watermark": 0.0, "prefix_caching": True, "num_gpu_blocks": 21}
    outcome = compare("vllm-chunked", "none", jobs, "even", **options)
    assert "cached_tokens=0," not in outcome.jobs[1]
