"""A pipeline of stages, each busy with one iteration at most: worked out by hand, and what must not get lost in it."""

from __future__ import annotations

import dataclasses

import pytest

from fastserve.core.clock import VirtualClock
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, Engine, Timeline
from fastserve.kvcache import Direction, Transfer
from fastserve.latency import DecodeFit, FittedLatency, PrefillFit, StageLink, load_profile
from fastserve.policies.discovery import list_policies
from fastserve.scheduler import Iteration
from fastserve.simulation import simulated_engine
from fastserve.simulation.executor import SimulatedExecutor, _shape
from support.checked_engine import CheckedEngine
from support.engines import LATENCY, LINK, STAGE_LINK, arrival, make_engine
from support.timelines import threads_of
from support.watch import finish_ms, ms, watch

NO_TIME = StageLink(0.0, 1e15, 1)


def spans(engine: Engine) -> list[tuple[float, float]]:
    return [(ms(record.start_s), ms(record.end_s)) for record in engine.iterations]


# -- by hand: a prompt token takes 1 ms and any iteration at least 10 in each stage; sending 1 ms and 0.1 a token ------


def test_two_stages_two_requests() -> None:
    engine = make_engine("fastserve-fcfs", max_batch_size=1, num_stages=2)
    kept = watch(engine)
    jobs = engine.run([arrival("a", 0, 20, 3), arrival("b", 0, 5, 3)])
    # a's prompt: 30 ms, sent in 3, 30 more. b's: 15 from 30 on, there at 46.5, where a keeps the stage until 63.
    # Two are in flight, and so nothing starts at 45, but at 63, when a's has ended: 63-73, there at 74.1, and b has
    # the stage until 78. From there on nobody waits for a stage, and one step takes 10 + 1.1 + 10.
    assert kept.batches == [("a",), ("b",)] * 3
    assert spans(engine) == [(0, 63), (30, 78), (63, 88), (78, 99.1), (88, 109.1), (99.1, 120.2)]
    assert finish_ms(jobs) == {"a": 109.1, "b": 120.2}
    assert [ms(job.first_token_s) for job in jobs] == [63, 78]
    assert [ms(job.execution_s) for job in jobs] == [109.1, 90.2]
    assert [ms(job.metrics.queueing_s) for job in jobs] == [0, 30]
    # Neither waits while the other runs.
    assert [record.num_waiting for record in engine.iterations] == [0] * 6
    assert [job.preemptions for job in jobs] == [0, 0]


def test_a_decision_is_taken_when_the_first_stage_is_free_and_knows_who_came_until_then() -> None:
    engine = make_engine("fixed-priority", max_batch_size=1, num_stages=2)
    kept = watch(engine)
    engine.run([arrival("a", 0, 20, 2), arrival("b", 0.001, 9, 1), arrival("c", 0.029, 5, 1)])
    # The stage is free at 30: c came later than b, and goes first. When a has ended, at 63, it is not as urgent as b,
    # whose prompt takes 19 ms there.
    assert kept.batches == [("a",), ("c",), ("b",), ("a",)]
    assert [start for start, _ in spans(engine)] == [0, 30, 63, 82]
    assert [time for time, _ in kept.decisions] == [0, 30, 63, 82]


def test_who_is_in_flight_is_skipped_and_keeps_its_place() -> None:
    engine = make_engine("fastserve", {"quantum_base_s": 0.1}, max_batch_size=1, num_stages=2)
    (job,) = engine.run([arrival("a", 0, 20, 3)])
    # Alone it goes through both stages, and the next token needs the last.
    assert spans(engine) == [(0, 63), (63, 84.1), (84.1, 105.2)]
    assert job.preemptions == 0
    assert ms(job.swapping_s) == ms(job.metrics.queueing_s) == 0


def test_three_stages_hold_three() -> None:
    engine = make_engine("fastserve-fcfs", max_batch_size=1, num_stages=3, stage_link=NO_TIME)
    kept = watch(engine)
    engine.run([arrival(name, 0, 10, 2) for name in "abcd"])
    # Prompts: 20 ms in each stage. d finds no place before a has ended; then all steps of 10 ms follow each other.
    assert kept.batches[:4] == [("a",), ("b",), ("c",), ("a",)]
    assert spans(engine)[:4] == [(0, 60), (20, 80), (40, 100), (60, 110)]
    # b's step follows a's at 80, c's at 100 and ends with the stage to itself, d's prompt takes a's place at 110.
    assert kept.batches[4:] == [("b",), ("c",), ("d",), ("d",)]
    assert spans(engine)[4:] == [(80, 120), (100, 130), (110, 170), (170, 200)]


def test_a_padded_iteration_sends_its_padding() -> None:
    engine = make_engine("run-to-completion", {"max_seq_len": 64}, max_batch_size=2, num_stages=2)
    engine.run([arrival("a", 0, 10, 1), arrival("b", 0, 20, 2)])
    # 10 + 2 * 20 ms in each stage, and 40 tokens sent in 5 ms; then two rows, 10 + 1.2 + 10.
    assert spans(engine) == [(0, 105), (105, 126.2)]


def test_room_that_an_iteration_in_flight_holds_is_waited_for() -> None:
    engine = make_engine("fastserve-fcfs", {"swap": "none"}, num_gpu_blocks=4, num_stages=2, engine_class=CheckedEngine)
    kept = watch(engine)
    jobs = engine.run([arrival("a", 0, 12, 2), arrival("b", 0, 8, 1)])
    # a: 22 + 2.2 + 22, then 10 + 1.1 + 10, and holds 3 blocks, then all 4. Whenever the first stage is free b is tried
    # and finds no room; nobody is robbed or waits for a transfer, but for the end of a's iteration.
    assert spans(engine) == [(0, 46.2), (46.2, 67.3), (67.3, 105.1)]
    assert [time for time, iteration in kept.decisions if not iteration.requests] == [22, 56.2]
    assert [(job.recomputed_tokens, job.preemptions, job.swapping_s) for job in jobs] == [(0, 0, 0)] * 2
    assert kept.stalls == []
    assert [record.stalled_s for record in engine.iterations] == [0] * 3


def test_who_waits_for_a_transfer_is_charged_until_the_next_decision() -> None:
    engine = make_engine("fastserve-fcfs", {"swap": "reactive"}, num_gpu_blocks=8, num_stages=2)
    kept = watch(engine)
    jobs = engine.run([arrival("a", 0, 12, 12), arrival("b", 0, 12, 12)])
    for job in jobs:
        metrics = job.metrics
        parts = metrics.queueing_s + metrics.swapping_s + metrics.execution_s
        assert parts == pytest.approx(metrics.finished_s - metrics.arrival_s)
        assert metrics.queueing_s > -1e-9
    # a grows into b's room, and b comes back when a has ended. Both are due meanwhile, one after the other.
    assert kept.swap_outs == kept.swap_ins == ["b"]
    assert [ms(job.swapping_s) for job in jobs] == [
        sum(end - start for start, end, who in kept.stalls if name in who) for name in "ab"
    ]
    assert all(job.swapping_s > 0 for job in jobs)


def test_an_abort_in_flight_takes_effect_when_its_iteration_ends() -> None:
    engine = make_engine("fastserve-fcfs", max_batch_size=1, num_stages=2, engine_class=CheckedEngine)
    for name in "abc":
        engine.add_request(Request(name, 0, 10), SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()  # a's prompt has left the first stage.
    engine.abort("a")
    assert engine.kv.num_free_gpu_blocks == 1000 - 3
    while engine.has_unfinished:
        engine.step()
    assert engine.kv.num_free_gpu_blocks == 1000
    assert [record.num_waiting for record in engine.iterations][:3] == [1, 0, 0]


# -- every policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("policy", sorted(list_policies()))
def test_every_policy_fills_all_batches(policy: str, num_stages: int) -> None:
    engine = make_engine(policy, max_batch_size=2, num_stages=num_stages, max_model_len=30, engine_class=CheckedEngine)
    most: list[int] = []
    submit = engine.executor.submit

    def submit_and_count(iteration: Iteration) -> None:
        submit(iteration)
        flying = [request for batch in (*engine._in_flight, iteration) for request in batch.requests]
        assert len(flying) == len(set(flying))
        most.append(len(flying))

    engine.executor.submit = submit_and_count
    jobs = engine.run([arrival(f"{i}", 0, 4, 12) for i in range(12)])
    assert all(job.metrics.status == "finished" for job in jobs)
    # Most of the time, and not only at the start.
    assert max(most) == 2 * num_stages == sorted(most)[len(most) // 2]


def test_run_to_completion_has_a_static_batch_for_every_stage() -> None:
    engine = make_engine("run-to-completion", {"max_seq_len": 64}, max_batch_size=2, num_stages=2)
    kept = watch(engine)
    engine.run([arrival("a", 0, 4, 2), arrival("b", 0, 4, 4), arrival("c", 0, 4, 9), arrival("d", 0, 4, 2),
                arrival("e", 0, 4, 1)])  # fmt: skip
    assert kept.batches[:6] == [("a", "b"), ("c", "d")] * 3
    # a and b leave together after four, and e takes the place of both.
    assert kept.batches[6:9] == [("a", "b"), ("c", "d"), ("e",)]
    assert kept.done == ["a", "b", "e", "c", "d"]


def test_who_lost_its_cache_waits_in_order_of_arrival() -> None:
    # The newest running request is in flight when room is needed, so an older one is dropped; later the newest too.
    requests = [arrival("a", 0, 11, 31), arrival("b", 0, 1, 19), arrival("c", 0, 24, 30)]
    sizes = {"num_gpu_blocks": 23, "max_batch_size": 2, "token_budget": 1, "num_stages": 2}
    engine = make_engine("vllm", engine_class=CheckedEngine, **sizes)
    kept = watch(engine)
    jobs = engine.run(requests)
    assert [name for name, _ in kept.drops[:2]] == ["b", "c"]
    assert all(job.metrics.status == "finished" for job in jobs)


# -- what must not get lost ------------------------------------------------------------------------------------------

STAGE = FittedLatency(PrefillFit(0.010, 0.0005, 0.0), (DecodeFit(0.008, 1e-5, 2e-4),))


def scaled(latency: FittedLatency, factor: float) -> FittedLatency:
    prefill = PrefillFit(*(factor * value for value in dataclasses.astuple(latency.prefill)))
    return FittedLatency(
        prefill,
        tuple(
            DecodeFit(factor * fit.constant, factor * fit.per_context_token, factor * fit.per_request)
            for fit in latency.decode
        ),
    )


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("policy", ["fastserve-fcfs", "vllm", "orca"])
def test_a_full_pipeline_serves_as_many_times_more_as_it_has_stages(policy: str, num_stages: int) -> None:
    def duration(stages: int, latency: FittedLatency) -> float:
        engine = make_engine(
            policy, num_gpu_blocks=100_000, max_batch_size=4, max_model_len=200, latency=latency, num_stages=stages,
            stage_link=NO_TIME,
        )  # fmt: skip
        engine.run([arrival(f"{i}", 0, 20, 60) for i in range(120)])
        return engine.clock.now()

    unpipelined = duration(1, scaled(STAGE, num_stages))
    # Short of it where prompts among decode steps make iterations unequal, so that a stage waits for another.
    assert 0.9 * num_stages < unpipelined / duration(num_stages, STAGE) <= num_stages + 1e-9


@pytest.mark.parametrize("policy", sorted(list_policies()))
def test_a_stage_is_busy_with_one_iteration_and_takes_them_in_order(policy: str) -> None:
    engine = make_engine(policy, num_gpu_blocks=30, max_batch_size=2, num_stages=3, engine_class=CheckedEngine)
    starts_of_last: list[float] = []
    first_free_at = last_free_at = 0.0
    submit = engine.executor.submit

    def submit_and_check(iteration: Iteration) -> None:
        nonlocal first_free_at, last_free_at
        submit(iteration)
        if not iteration.requests:
            return
        now, end = engine.clock.now(), engine.executor._computing[-1].end_s
        duration = LATENCY.iteration_time(*_shape(iteration))
        sending = STAGE_LINK.transfer_time(1)
        assert now >= first_free_at - 1e-9
        assert end >= last_free_at + duration - 1e-9
        assert end - now >= 3 * duration + 2 * sending - 1e-9
        first_free_at, last_free_at = now + duration, end
        starts_of_last.append(end - duration)

    engine.executor.submit = submit_and_check
    jobs = engine.run([arrival(f"{i}", 0.01 * i, 3 + 7 * i % 23, 5 + 11 * i % 17) for i in range(20)])
    assert len(starts_of_last) == len(engine.iterations) > 20
    assert sum(job.metrics.output_tokens for job in jobs) == sum(5 + 11 * i % 17 for i in range(20))


def test_the_executor_says_what_is_free_and_what_has_ended() -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor((LATENCY,) * 2, LINK, clock, stage_link=STAGE_LINK)
    a, b = Request("a", 0, 20), Request("b", 0, 5)
    assert executor.can_submit
    assert not executor.can_collect
    assert executor.max_in_flight == 2
    moving = Transfer(b, Direction.OUT, (0,) * 40, (0,) * 40, 40_000)
    executor.submit(Iteration((a,), (20,), swap_out=(moving,)))
    assert not executor.can_submit
    executor.wait(0.020)
    assert ms(clock.now()) == 20
    executor.wait(1.0)  # The first stage ends its part.
    assert ms(clock.now()) == 30
    assert executor.can_submit
    assert not executor.can_collect
    executor.wait(1.0)  # The transfer ends.
    assert ms(clock.now()) == 40
    assert len(executor.finished_transfers()) == 1
    executor.wait(1.0)  # The last stage ends.
    assert executor.can_collect
    result = executor.collect()
    assert (ms(result.start_s), ms(result.end_s), ms(clock.now())) == (0, 63, 63)
    executor.wait(0.1)
    assert ms(clock.now()) == 100
    assert executor.predict_ends(Iteration((a,), (1,)), 5, 1.0) is None


def test_a_profile_with_two_stages_is_simulated_with_two() -> None:
    base = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    profile = dataclasses.replace(
        base, stage=scaled(base.stage, 0.5), pipeline_parallel_size=2, stage_link=StageLink(1e-5, 25e9, 10_240)
    )
    engine = simulated_engine(profile, "fastserve-fcfs")
    assert engine.executor.max_in_flight == engine.scheduler.config.pipeline_depth == 2
    assert engine.scheduler.config.num_places == 32
    engine.run([Arrival(Request("a", 0, 100), SamplingParams(max_tokens=3, ignore_eos=True))])
    expected = [profile.latency.iteration_time(*lens) for lens in (((100,), ()), ((), (101,)), ((), (102,)))]
    assert [record.end_s - record.start_s for record in engine.iterations] == pytest.approx(expected)


@pytest.mark.parametrize("policy", ["fastserve", "fastserve-fcfs"])
@pytest.mark.parametrize("swap", ["proactive", "reactive"])
def test_the_timeline_shows_as_much_waiting_for_transfers_as_is_charged(policy: str, swap: str) -> None:
    engine = make_engine(policy, {"swap": swap}, num_gpu_blocks=40, max_batch_size=3, num_stages=3)
    engine.observer = timeline = Timeline()
    jobs = engine.run([arrival(f"{i}", 0.03 * i, 5 + i * 7 % 30, 20 + i * 11 % 30) for i in range(14)])
    threads = threads_of(timeline.events())
    for job in jobs:
        drawn = threads["requests", job.request.request_id]
        waited = sum(span["dur"] for span in drawn if span["name"] == "waiting for swap")
        assert waited / 1e6 == pytest.approx(job.swapping_s, abs=1e-6)
    assert sum(job.swapping_s for job in jobs) > 0.1
