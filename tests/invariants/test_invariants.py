"""Invariants I1 to I5, I7 and I8 on generated scenarios; I6 is in test_tokens_survive_preemption.py."""

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.options import option_names
from fastserve.engine import Job
from fastserve.policies.discovery import find_policy, list_policies
from support.checked_engine import CheckedEngine
from support.engines import arrival, make_engine
from support.profiles import share

POLICIES = sorted(list_policies())
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Scenario:
    policy: str
    swap: str
    num_gpu_blocks: int
    num_host_blocks: int
    max_batch_size: int
    token_budget: int
    requests: tuple[tuple[float, int, int], ...]
    """Gap to the one before (s), prompt, output."""
    aborts: tuple[tuple[int, int], ...]
    """(step, request)"""
    alpha_s: float | None
    num_stages: int = 1
    prefix_caching: bool = False
    v1: bool = False
    wait_for_swaps: bool = True
    admission_gate: float = 0.0


def scenarios(policies: st.SearchStrategy[str]) -> st.SearchStrategy[Scenario]:
    return st.builds(
        Scenario,
        policy=policies,
        swap=st.sampled_from(["proactive", "reactive", "recompute", "none"]),
        num_gpu_blocks=st.integers(4, 40),
        num_host_blocks=st.integers(0, 40),
        max_batch_size=st.integers(1, 5),
        token_budget=st.integers(1, 40),
        requests=st.lists(
            st.tuples(st.floats(0, 0.2), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=14
        ).map(tuple),
        aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 13)), max_size=4).map(tuple),
        alpha_s=st.sampled_from([None, 0.05, 0.3]),
        num_stages=st.sampled_from([1, 1, 2, 3]),
        prefix_caching=st.booleans(),
        v1=st.booleans(),
        wait_for_swaps=st.booleans(),
        admission_gate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    )


def run(scenario: Scenario) -> tuple[CheckedEngine, list[Job]]:
    """Drive the engine as `Engine.run` does, with aborts in between."""
    names = ("swap", "alpha_s", "v1", "wait_for_swaps", "admission_gate")
    wanted = {name: getattr(scenario, name) for name in names}
    known = option_names(find_policy(scenario.policy).Options)
    options = {name: value for name, value in wanted.items() if name in known}
    if scenario.policy == "vllm" and scenario.swap in ("proactive", "none"):
        del options["swap"]
    engine = make_engine(
        scenario.policy,
        options,
        num_gpu_blocks=scenario.num_gpu_blocks,
        num_host_blocks=scenario.num_host_blocks,
        max_batch_size=scenario.max_batch_size,
        token_budget=scenario.token_budget,
        engine_class=CheckedEngine,
        num_stages=scenario.num_stages,
        prefix_caching=scenario.prefix_caching,
    )
    at, arrivals = 0.0, []
    for i, (gap, prompt, output) in enumerate(scenario.requests):
        at += gap
        arrivals.append(arrival(str(i), at, prompt, output))
    aborts: dict[int, list[int]] = {}
    for step, victim in scenario.aborts:
        aborts.setdefault(step, []).append(victim)
    steps = 0
    original_step = engine.step

    def step_with_aborts(until: float = math.inf) -> list[Job]:
        nonlocal steps
        for victim in aborts.get(steps, []):
            engine.abort(str(victim))
        steps += 1
        assert steps < 20_000, "no end in sight"
        return original_step(until) if engine.has_unfinished else []

    engine.step = step_with_aborts  # type: ignore[method-assign]
    return engine, engine.run(arrivals)


def check_outcome(scenario: Scenario, engine: CheckedEngine, jobs: list[Job]) -> None:
    # I1: every request that arrived has ended, once.
    assert sorted(int(job.request.request_id) for job in jobs) == list(range(len(scenario.requests)))
    assert not engine.has_unfinished
    assert engine.scheduler.num_requests == 0
    # I2: everything was given back.
    assert engine.kv.num_free_gpu_blocks == scenario.num_gpu_blocks
    assert engine.kv.num_free_host_blocks == scenario.num_host_blocks
    assert engine.kv.num_vacating_blocks == 0
    for job, (_, prompt, output) in zip(jobs, scenario.requests, strict=True):
        metrics = job.metrics
        fits = math.ceil((prompt + output - 1) / BLOCK_SIZE) <= scenario.num_gpu_blocks
        if not fits:
            assert metrics.status == "rejected"
            assert f"{scenario.num_gpu_blocks}" in metrics.error
            continue
        assert metrics.status in ("finished", "aborted")
        if metrics.status == "finished":
            assert metrics.output_tokens == output
            # I5: arrival <= first schedule <= first token <= finish, and the three parts add up to the whole.
            assert metrics.arrival_s <= metrics.first_scheduled_s < metrics.first_token_s <= metrics.finished_s
            parts = metrics.queueing_s + metrics.swapping_s + metrics.execution_s
            assert math.isclose(parts, metrics.finished_s - metrics.arrival_s, abs_tol=1e-9)
            assert metrics.queueing_s > -1e-9
            assert scenario.prefix_caching or not metrics.cached_tokens
            # Swapped back in as often as swapped out, unless its cache was never wanted again.
            assert metrics.swap_in_bytes <= metrics.swap_out_bytes
    starts = [record.start_s for record in engine.iterations]
    assert starts == sorted(starts)


@pytest.mark.parametrize("policy", POLICIES)
@given(scenario=scenarios(st.just("the parameter")))
@share(1 / len(POLICIES))
def test_i1_i2_i3_i4_i5_i8_hold_in_generated_scenarios(policy: str, scenario: Scenario) -> None:
    scenario = replace(scenario, policy=policy)
    engine, jobs = run(scenario)
    check_outcome(scenario, engine, jobs)


@given(scenarios(st.sampled_from(POLICIES)))
@share(1 / 25)
def test_i7_the_same_scenario_gives_the_same_run(scenario: Scenario) -> None:
    (first, first_jobs), (second, second_jobs) = run(scenario), run(scenario)
    assert first.iterations == second.iterations
    assert [repr(job.metrics) for job in first_jobs] == [repr(job.metrics) for job in second_jobs]


def test_scenarios_reach_every_kind_of_preemption() -> None:
    """The generator above is worth nothing if its pools are never short."""
    requests = tuple((0.01, 20, 30) for _ in range(10))
    base = Scenario("fastserve", "reactive", 26, 200, 4, 64, requests, (), 0.3)
    jobs = run(base)[1]
    assert sum(job.swap_out_bytes for job in jobs) > 0
    assert sum(job.swap_in_bytes for job in jobs) > 0
    host_full = run(Scenario("fastserve", "reactive", 26, 0, 4, 64, requests, (), 0.3))[1]
    assert sum(job.recomputed_tokens for job in host_full) > 0
    assert sum(job.swap_out_bytes for job in host_full) == 0
    assert sum(job.cached_tokens for job in host_full) == 0
    found = run(replace(base, num_host_blocks=0, prefix_caching=True))[1]
    assert sum(job.cached_tokens for job in found) > 0
    assert sum(job.recomputed_tokens for job in found) > 0
