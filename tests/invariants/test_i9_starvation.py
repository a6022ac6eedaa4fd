"""Invariant I9: with starvation prevention on, nobody waits longer than alpha, one iteration and its swap-in.

A wait of a request lasts from the end of an iteration it took part in, or its arrival, to the start of the next one it
takes part in. "As long as promoted jobs fit one batch" is taken to mean: at every decision during the wait, the highest
queue, where promotion leads, holds no more requests than the batch has places, and their prompts and caches fit the
token budget and the pool less its reserve, all at once; under `gittins`, that all who have waited alpha do so. What is
claimed of waits like that, under skip-join MLFQ, naive MLFQ and gittins with `alpha_s` set and a look at who has waited
too long before every decision:

1. Where all caches fit the GPU: it takes part in the first iteration that is decided once it has waited alpha, so that
   it has waited at most alpha and what was left then of the iteration that ran.
   In a pipeline decisions are taken when the first stage is free. If that took longer than alpha, whoever loses its
   place only then is promoted by the decision after it.
2. Where they do not, and move proactively: alpha, plus that iteration, plus the time to move out whoever must make
   room and to move in its own cache, each behind what the link has to carry already (at most the budget and one
   request), and each noticed at the end of an iteration: for every request of the highest queue at most once each. Plus
   `stay_tokens` iterations of whoever was just brought in and must give up its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.options import option_names
from fastserve.core.request import Request
from fastserve.engine import Engine
from fastserve.policies.discovery import find_policy
from fastserve.scheduler import Iteration, Scheduler
from support.engines import arrival, make_engine
from support.profiles import share
from support.watch import watch

EPSILON = 1e-9
LONGEST_PROMPT = 40


@dataclass(frozen=True)
class Wait:
    name: str
    start: float
    end: float
    promoted_fit: bool
    """Whether at every decision in this time those in the highest queue fitted one batch."""
    passed_over: int
    """Iterations that were decided when it had waited alpha already, and that it took no part in."""


def promoted(scheduler: Scheduler) -> list[Request]:
    """Those who come first for having waited, or would if they fitted one batch."""
    if scheduler.policy.name == "gittins":
        return list(scheduler.policy._starved.values())
    return [request for request in scheduler.queue.in_order() if request.level == 0]


def waits(engine: Engine, jobs: list[tuple[float, int, int]], alpha_s: float) -> list[Wait]:
    """Run the jobs (gap to the one before, prompt, output), and return every wait there was."""
    scheduler, kv = engine.scheduler, engine.kv
    watch(engine)
    room = kv.config.num_gpu_blocks - scheduler.mover._most_reserved
    arrivals = []
    at = 0.0
    for i, (gap, prompt, output) in enumerate(jobs):
        at += gap
        arrivals.append(arrival(f"{i}", at, prompt, output))
    since = {entry.request.request_id: entry.request.arrival_s for entry in arrivals}
    fit = dict.fromkeys(since, True)
    passed_over = dict.fromkeys(since, 0)
    found: list[Wait] = []
    submit, decide = engine.executor.submit, scheduler.decide
    fits_now = True

    def decide_and_look(now: float) -> Iteration:
        nonlocal fits_now
        first = promoted(scheduler)
        caches = sum(kv.blocks_for(request.num_tokens) for request in first)
        fits_now = len(first) <= scheduler.config.max_batch_size and caches <= room
        return decide(now)

    def submit_and_look(iteration: Iteration) -> None:
        now = engine.clock.now()
        running = {request.request_id for request in iteration.requests}
        losing_their_place = {request.request_id for request in iteration.preempted}
        for name in engine.jobs:
            fit[name] &= fits_now
            if name in running:
                found.append(Wait(name, since[name], now, fit[name], passed_over[name]))
                fit[name] = True
                passed_over[name] = 0
            elif iteration.requests and now - since[name] >= alpha_s and name not in losing_their_place:
                passed_over[name] += 1
        submit(iteration)
        if iteration.requests:
            end = engine.executor._computing[-1].end_s
            since.update(dict.fromkeys(running, end))

    scheduler.decide = decide_and_look
    engine.executor.submit = submit_and_look
    done = engine.run(arrivals)
    assert all(job.metrics.status == "finished" for job in done)
    return found


jobs = st.lists(
    st.tuples(st.floats(0, 0.1), st.integers(1, LONGEST_PROMPT), st.integers(1, 60)), min_size=2, max_size=12
)


@share(1 / 10)
@given(
    policy=st.sampled_from(["fastserve", "mlfq", "gittins"]),
    jobs=jobs,
    max_batch_size=st.integers(1, 4),
    alpha_s=st.sampled_from([0.03, 0.1, 0.3]),
    quantum_base_s=st.sampled_from([0.010, 0.040]),
    insertion=st.sampled_from(["back", "front"]),
    promotion_resets_quantum=st.booleans(),
    num_stages=st.sampled_from([1, 2, 3]),
)
def test_i9_nobody_waits_longer_than_alpha_and_an_iteration(
    policy: str,
    jobs: list[tuple[float, int, int]],
    max_batch_size: int,
    alpha_s: float,
    num_stages: int,
    **options: object,
) -> None:
    sizes = {"num_gpu_blocks": 1000, "max_batch_size": max_batch_size, "token_budget": 1000, "num_stages": num_stages}
    known = option_names(find_policy(policy).Options)
    options = {name: value for name, value in options.items() if name in known}
    engine = make_engine(policy, {"alpha_s": alpha_s, **options}, **sizes)
    for wait in waits(engine, jobs, alpha_s + EPSILON):
        if wait.promoted_fit:
            assert wait.passed_over == 0, wait
            longest = max(record.end_s - record.start_s for record in engine.iterations)
            assert wait.end - wait.start <= alpha_s + longest + EPSILON, wait


@share(1 / 10)
@given(
    policy=st.sampled_from(["fastserve", "mlfq", "gittins"]),
    jobs=jobs,
    num_gpu_blocks=st.integers(26, 80),
    max_batch_size=st.integers(1, 4),
    alpha_s=st.sampled_from([0.03, 0.1, 0.3]),
    swap_budget_blocks=st.sampled_from([4, 64]),
    reserve=st.sampled_from(["history", "none"]),
    stay_tokens=st.sampled_from([0, 8]),
    num_stages=st.sampled_from([1, 2, 3]),
)
def test_i9_nobody_waits_longer_than_alpha_an_iteration_and_its_swap_in(
    policy: str,
    jobs: list[tuple[float, int, int]],
    num_gpu_blocks: int,
    max_batch_size: int,
    alpha_s: float,
    swap_budget_blocks: int,
    reserve: str,
    stay_tokens: int,
    num_stages: int,
) -> None:
    options = {"alpha_s": alpha_s, "swap_budget_blocks": swap_budget_blocks}
    options |= {"reserve": reserve, "stay_tokens": stay_tokens}
    sizes = {"num_gpu_blocks": num_gpu_blocks, "max_batch_size": max_batch_size, "token_budget": 1000}
    sizes["num_stages"] = num_stages
    engine = make_engine(policy, options, **sizes)
    found = waits(engine, jobs, alpha_s + EPSILON)
    longest = max(record.end_s - record.start_s for record in engine.iterations)
    # A block takes 1 ms each way, and the largest cache is of 40 + 60 tokens, 25 blocks.
    one_way = 0.001 * (swap_budget_blocks + 25)
    bound = alpha_s + longest + max_batch_size * 2 * (one_way + longest) + stay_tokens * longest
    for wait in found:
        if wait.promoted_fit:
            assert wait.end - wait.start <= bound + EPSILON, (wait, bound)


@pytest.mark.parametrize("policy", ["fastserve", "gittins"])
def test_i9_scenarios_have_promotions_and_moving_caches(policy: str) -> None:
    """The generators above are worth nothing if nobody is ever promoted, or always too many."""
    for num_gpu_blocks in (1000, 60):
        engine = make_engine(
            policy, {"alpha_s": 0.1}, num_gpu_blocks=num_gpu_blocks, max_batch_size=3, token_budget=1000
        )
        found = waits(engine, [(0.02, 10 + 3 * i, 40) for i in range(8)], 0.1)
        long = [wait for wait in found if wait.end - wait.start > 0.1]
        assert sum(wait.promoted_fit for wait in long) >= 5
        assert bool(engine.observer.transfers) == (num_gpu_blocks == 60)
