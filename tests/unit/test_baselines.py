"""What each policy of the comparison decides, worked out by hand on the latency model of support.engines."""

from __future__ import annotations

import dataclasses

import pytest

from fastserve.core.errors import ConfigError
from fastserve.core.request import RESIDENT, SWAPPED_OUT, Request
from fastserve.engine import EngineView
from fastserve.kvcache import Location
from fastserve.latency import DecodeFit, FittedLatency, PrefillFit
from fastserve.policies.discovery import list_policies
from fastserve.scheduler import Iteration, Scheduler
from support.caches import place, start
from support.engines import arrival, make_engine
from support.watch import finish_ms, ms, names, watch

# -- naive MLFQ ------------------------------------------------------------------------------------------------------


def test_mlfq_knows_no_prompt_lengths() -> None:
    scheduler = make_engine("mlfq", {"quantum_base_s": 0.010}).scheduler
    requests = [place(scheduler, str(prompt), 0, prompt) for prompt in (60, 1, 30)]
    assert [request.level for request in requests] == [0, 0, 0]
    assert names(scheduler.queue.in_order()) == ("60", "1", "30")
    # 70 ms of a quantum of 10: down to level 1, whose 20 ms cover the 10 of the next iteration.
    first = requests[0]
    first.num_computed_tokens, first.num_tokens = 60, 61
    scheduler.policy.on_progress(first, 0.0, 0.070)
    assert first.level == 1


# -- fixed priority ----------------------------------------------------------------------------------------------------


def test_fixed_priority_is_the_prompt_length_for_good() -> None:
    engine = make_engine("fixed-priority", max_batch_size=1)
    kept = watch(engine)
    jobs = engine.run([arrival("long", 0, 20, 4), arrival("short", 0.035, 5, 3), arrival("mid", 0.036, 10, 1)])
    # long: 30, then 40. short came at 35, is shorter, and stays so however much it has run: 40-55-65-75. mid 75-95.
    assert [(ran.names[0], ran.end) for ran in kept.iterations] == [
        *[("long", 30), ("long", 40)],
        *[("short", 55), ("short", 65), ("short", 75)],
        ("mid", 95),
        *[("long", 105), ("long", 115)],
    ]
    assert {ran.names[0]: ran.levels[0] for ran in kept.iterations} == {"long": 20, "short": 5, "mid": 10}
    assert [job.preemptions for job in jobs] == [1, 0, 0]


def test_equal_prompts_are_first_come_first_served() -> None:
    engine = make_engine("fixed-priority", max_batch_size=1)
    jobs = engine.run([arrival("a", 0, 10, 5), arrival("b", 0.001, 10, 1)])
    assert finish_ms(jobs) == {"a": 60, "b": 80}


# -- shortest remaining processing time --------------------------------------------------------------------------------


def test_srpt_runs_whoever_ends_soonest() -> None:
    engine = make_engine("srpt", max_batch_size=1)
    kept = watch(engine)
    engine.run([arrival("a", 0, 10, 8), arrival("b", 0.025, 10, 3), arrival("c", 0.026, 40, 1)])
    # a: 20 ms, 7 steps left; 30, 6 left. b, 20 ms (2 steps) and 2 more tokens: 4 < 6. c, 50 ms: 5. b ends at 70. Then
    # c, 5 < 6, ends at 120. a's other six: 180.
    assert kept.done == ["b", "c", "a"]
    assert [(ran.names[0], ran.levels[0], ran.end) for ran in kept.iterations[:6]] == [
        ("a", 9, 20),
        ("a", 7, 30),
        ("b", 4, 50),
        ("b", 2, 60),
        ("b", 1, 70),
        ("c", 5, 120),
    ]


def test_srpt_counts_what_must_be_computed_again() -> None:
    engine = make_engine("srpt")
    scheduler = engine.scheduler
    scheduler.policy.oracle = lambda request: 7
    request = place(scheduler, "a", 0, 15, RESIDENT)
    assert scheduler.policy.remaining_iterations(request) == 7
    engine.kv.drop(request)
    # 16 tokens at once, 26 ms, are 3 steps, with the first of the seven tokens.
    assert scheduler.policy.remaining_iterations(request) == 3 + 6


def test_srpt_alone_is_told_the_future() -> None:
    ours = [cls for cls in list_policies().values() if cls.__module__.split(".")[0] in ("fastserve", "baselines")]
    assert [cls.name for cls in ours if cls.needs_oracle] == ["srpt"]
    # What every scheduler sees has no place for it.
    assert {field.name for field in dataclasses.fields(Request)} == {
        *("request_id", "arrival_s", "num_prompt_tokens", "token_ids", "max_output_tokens", "num_tokens"),
        *("num_computed_tokens", "status", "in_flight", "level", "position", "line", "cache_state", "cache_capacity"),
        *("num_tokens_at_swap_in", "num_lost_tokens", "wait_ends_s", "last_ran_s", "policy_state"),
        *("location", "gpu_blocks", "host_blocks", "has_place", "is_chosen", "is_put_back", "previous", "next"),
        *("wait_before", "wait_behind"),
    }
    assert not hasattr(Request("a", 0, 1), "__dict__")


@pytest.mark.parametrize("policy", sorted(set(list_policies()) - {"srpt"}))
def test_no_other_policy_can_tell_outputs_apart(policy: str) -> None:
    # The first eight tokens of two runs whose outputs are 9 to 11, or 29 to 31, are decided alike.
    runs = []
    for output in (9, 29):
        engine = make_engine(policy, num_gpu_blocks=40, max_batch_size=2, max_model_len=100)
        kept = watch(engine)
        engine.run([arrival(f"{i}", 0.01 * i, 10 + i, output + i) for i in range(3)])
        runs.append(kept.iterations[:9])
        assert not hasattr(engine.scheduler.policy, "oracle")
    assert runs[0] == runs[1]


# -- run to completion -------------------------------------------------------------------------------------------------


def test_run_to_completion_pads_and_waits_for_the_longest() -> None:
    engine = make_engine("run-to-completion", {"max_seq_len": 64}, max_batch_size=2)
    kept = watch(engine)
    free: list[int] = []
    on_iteration = kept.on_iteration

    def count_and_keep(engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        free.append(engine.kv.num_free_gpu_blocks)
        on_iteration(engine, iteration, start_s, end_s)

    kept.on_iteration = count_and_keep
    jobs = engine.run([arrival("a", 0, 10, 2), arrival("b", 0, 20, 4), arrival("c", 0.055, 5, 1)])
    # a's prompt is padded to 20: 10 + 2 * 20 = 50 ms. Then 10 ms a token. a has its second at 60, and stays as padding
    # (0 tokens) until b has its fourth at 80. c came at 55, and the place that a left at 60 is not for it: 80-95.
    assert [(ran.names, ran.tokens, ran.start, ran.end) for ran in kept.iterations] == [
        (("a", "b"), (10, 20), 0, 50),
        (("a", "b"), (1, 1), 50, 60),
        (("a", "b"), (0, 1), 60, 70),
        (("a", "b"), (0, 1), 70, 80),
        (("c",), (5,), 80, 95),
    ]
    assert kept.done == ["a", "b", "c"]
    # a's result is held back with b's, and its place was in use all the time.
    assert finish_ms(jobs) == {"a": 80, "b": 80, "c": 95}
    assert [ms(job.execution_s) for job in jobs] == [80, 80, 15]
    assert [ms(job.metrics.queueing_s) for job in jobs] == [0, 0, 25]
    assert [(ms(job.first_token_s), ms(job.last_token_s)) for job in jobs] == [(50, 60), (50, 80), (95, 95)]
    # 64 tokens, 16 blocks, were reserved for each. a's are given back when it ends, not when it leaves.
    assert free == [968, 968, 984, 984, 984]


def test_run_to_completion_pads_contexts_too() -> None:
    latency = FittedLatency(PrefillFit(0.010, 0.001, 0.0), (DecodeFit(0.010, 0.0001, 0.0),))
    engine = make_engine("run-to-completion", {"max_seq_len": 64}, latency=latency)
    kept = watch(engine)
    engine.run([arrival("a", 0, 10, 3), arrival("b", 0, 20, 3)])
    # Both take the time of 21 tokens, then of 22, at 0.1 ms.
    assert [ran.end - ran.start for ran in kept.iterations] == pytest.approx([50, 10 + 2 * 2.1, 10 + 2 * 2.2])


# -- Orca --------------------------------------------------------------------------------------------------------------


def test_orca_reserves_for_the_longest_output() -> None:
    engine = make_engine("orca", {"max_seq_len": 40}, num_gpu_blocks=25, max_batch_size=4)
    kept = watch(engine)
    jobs = engine.run([arrival(f"{i}", 0, 8, 3 + i) for i in range(4)])
    # 40 tokens, 10 blocks each, of 25: two at a time, although 8 + 6 tokens would take 4 blocks.
    # 0 and 1: 26, 36, 46 (0 ends); 1 and 2's prompt: 18 ms, 64 (1 ends); 2 and 3's prompt: 82; then 2's third to fifth
    # token, 92, 102, 112, beside 3's, which has its sixth at 132.
    assert kept.batches == [("0", "1")] * 3 + [("1", "2")] + [("2", "3")] * 4 + [("3",)] * 2
    assert finish_ms(jobs) == {"0": 46, "1": 64, "2": 112, "3": 132}
    assert engine.iterations[0].free_gpu_blocks == 25 - 20


def test_orca_reserves_no_more_than_was_declared() -> None:
    engine = make_engine("orca", {"max_seq_len": 40}, num_gpu_blocks=25)
    entry = arrival("a", 0, 8, 3)
    entry.request.max_output_tokens = 12
    assert engine.scheduler.policy.tokens_to_hold(entry.request) == 20
    entry.request.max_output_tokens = 90
    assert engine.scheduler.policy.tokens_to_hold(entry.request) == 40


@pytest.mark.parametrize("policy", ["orca", "run-to-completion"])
def test_nobody_starts_without_the_whole_reservation(policy: str) -> None:
    engine = make_engine(policy, {"max_seq_len": 60}, num_gpu_blocks=40, max_batch_size=4)
    kept, kv, submit = watch(engine), engine.kv, engine.executor.submit

    def submit_and_look(iteration: object) -> None:
        for request, tokens in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if tokens:
                assert kv.num_blocks(request) == 15
        submit(iteration)

    engine.executor.submit = submit_and_look
    jobs = engine.run([arrival(f"{i}", 0.01 * i, 4 + i, 10 + 3 * i) for i in range(8)])
    # So nobody ever needs another's room.
    assert sum(job.preemptions + job.recomputed_tokens for job in jobs) == 0
    assert max(len(ran.names) for ran in kept.iterations) == 2


# -- vLLM --------------------------------------------------------------------------------------------------------------


def test_vllm_gives_up_the_newest_when_memory_runs_out() -> None:
    # 5 blocks, prompts of 2. At 26 both have a token and 8 computed: for the ninth a takes the fifth block, and b, the
    # newer, is dropped. a's other eight: until 106. Then b: 9 tokens at once, 19 ms, and 7 more: 195.
    engine = make_engine("vllm", num_gpu_blocks=5)
    kept = watch(engine)
    jobs = engine.run([arrival("a", 0, 8, 9), arrival("b", 0, 8, 9)])
    assert kept.drops == [("b", 8)]
    assert kept.batches == [("a", "b")] + [("a",)] * 8 + [("b",)] * 8
    assert finish_ms(jobs) == {"a": 26 + 80, "b": 106 + 19 + 70}


def test_vllm_swapped_in_requests_decode_with_the_others() -> None:
    engine = make_engine("vllm", {"swap": "reactive"}, num_gpu_blocks=20, num_host_blocks=7, max_batch_size=3)
    kept, submit = watch(engine), engine.executor.submit

    def submit_and_look(iteration: object) -> None:
        # An iteration of prompts, or else one in which everyone who runs decodes.
        if iteration.requests and all(request.num_computed_tokens for request in iteration.requests):
            assert set(names(iteration.requests)) == set(engine.scheduler.running)
        submit(iteration)

    engine.executor.submit = submit_and_look
    engine.run([arrival("a", 0, 1, 13), arrival("b", 0, 25, 14), arrival("c", 0, 14, 16)])
    assert kept.swap_ins


# -- vLLM with chunked prefill -----------------------------------------------------------------------------------------


def test_chunks_fill_up_what_decoding_leaves() -> None:
    engine = make_engine("vllm-chunked", {"chunk_tokens": 8})
    kept = watch(engine)
    jobs = engine.run([arrival("a", 0, 4, 6), arrival("b", 0.001, 20, 2)])
    # a's prompt: 14 ms. Then a's token first, and 7 of b's 20 tokens beside it: 17 ms; 7 more; the last 6: 16 ms, and
    # only now has b a token. Then both decode.
    assert [(ran.names, ran.tokens, ran.end) for ran in kept.iterations] == [
        (("a",), (4,), 14),
        (("a", "b"), (1, 7), 31),
        (("a", "b"), (1, 7), 48),
        (("a", "b"), (1, 6), 64),
        (("a", "b"), (1, 1), 74),
        (("a",), (1,), 84),
    ]
    a, b = jobs
    assert (ms(b.first_scheduled_s), ms(b.first_token_s), ms(b.finished_s)) == (14, 64, 74)
    assert (ms(a.finished_s), ms(a.max_token_gap_s)) == (84, 17)


def test_no_iteration_exceeds_the_chunk() -> None:
    for chunk, budget in ((8, 64), (64, 8), (3, 64)):
        engine = make_engine("vllm-chunked", {"chunk_tokens": chunk}, max_batch_size=5, token_budget=budget)
        kept = watch(engine)
        jobs = engine.run([arrival(f"{i}", 0.01 * i, 5 + 9 * i, 6) for i in range(6)])
        assert max(sum(ran.tokens) for ran in kept.iterations) <= min(chunk, budget)
        assert [job.metrics.output_tokens for job in jobs] == [6] * 6
        for ran in kept.iterations:
            # Whoever decodes comes before any chunk: here, those whose prompt began before.
            assert list(ran.names) == sorted(ran.names) or chunk == 3


# -- what the authors released -----------------------------------------------------------------------------------------

PROFILED = {"first_iteration": "profiled", "starvation_check_every": 3}


def artifact(options: dict | None = None, **sizes: int) -> Scheduler:
    return make_engine("fastserve-artifact", options, **sizes).scheduler


def waiting(**sizes: int) -> Scheduler:
    """A scheduler that decides without the requests whose caches are swapped out or moving."""
    return artifact({"wait_for_swaps": True}, **sizes)


def test_artifact_joins_the_highest_queue_at_any_length() -> None:
    shipped, profiled = artifact(), artifact(PROFILED)
    # First iterations of 11, 20, 40, 70 ms. The quanta are 10, 20, 40, 80 ms.
    assert [place(shipped, str(prompt), 0, prompt).level for prompt in (1, 10, 30, 60)] == [0, 0, 0, 0]
    assert [place(profiled, str(prompt), 0, prompt).level for prompt in (1, 10, 30, 60)] == [1, 1, 2, 3]
    assert shipped.policy.quanta[:4] == pytest.approx([0.010, 0.020, 0.040, 0.080])


def test_artifact_demotes_by_one() -> None:
    scheduler = artifact()
    request = place(scheduler, "a", 0, 64)
    # 74 ms used of 10, and 74 more to come, which level 3 would be the first to cover.
    scheduler.policy.on_progress(request, 0.0, 0.074)
    assert request.level == 1


def test_artifact_demotes_who_has_used_more_than_the_quantum() -> None:
    scheduler = artifact()
    request = place(scheduler, "a", 0, 4, RESIDENT)
    scheduler.policy.on_progress(request, 0.0, 0.010)
    assert request.level == 0  # Not more than 10 ms yet.
    scheduler.policy.on_progress(request, 0.010, 0.020)
    assert request.level == 1


def test_artifact_puts_the_unfinished_in_front_and_the_new_at_the_back() -> None:
    scheduler = artifact()
    a, b = place(scheduler, "a", 0, 60), place(scheduler, "b", 0, 60)
    scheduler.policy.on_progress(a, 0.0, 0.070)
    scheduler.policy.on_progress(b, 0.070, 0.140)
    assert names(scheduler.queue.in_order()) == ("b", "a")  # Both in level 1, the later before the earlier.
    place(scheduler, "c", 0, 60)
    place(scheduler, "d", 0, 60)
    assert names(scheduler.queue.in_order()) == ("c", "d", "b", "a")


def test_artifact_looks_for_the_starved_only_now_and_then() -> None:
    scheduler = artifact({"alpha_s": 0.1, "starvation_check_every": 3}, max_batch_size=1)
    # In level 2, and it has run: its wait counts. One in level 0 has the place.
    place(scheduler, "runs", 0, 4, RESIDENT)
    request = place(scheduler, "waits", 0, 4, RESIDENT, level=2)
    start(scheduler, request, 0.0)
    scheduler._preempt([request], 0.0)
    levels = []
    for now in (0.05, 0.11, 0.12):
        scheduler.schedule(now)
        levels.append(request.level)
    assert levels == [2, 2, 0]  # Due at 100 ms; seen at the third decision.


def test_artifact_promotes_who_has_never_run_at_every_check() -> None:
    scheduler = artifact(PROFILED, max_batch_size=1)
    place(scheduler, "runs", 0, 4, RESIDENT, level=0)
    fresh, ran = place(scheduler, "fresh", 0, 60), place(scheduler, "ran", 0, 59, RESIDENT)
    assert (fresh.level, ran.level) == (3, 3)
    for now in (0.001, 0.002):
        scheduler.schedule(now)
        assert fresh.level == 3
    scheduler.schedule(0.003)
    # alpha is 3 s: nobody has waited that long. But one has never run.
    assert (fresh.level, ran.level) == (0, 3)


def test_artifact_stops_at_the_first_beyond_the_token_budget() -> None:
    for policy, batch in (("fastserve-artifact", ("a",)), ("mlfq", ("a", "c"))):
        scheduler = make_engine(policy, token_budget=16).scheduler
        for name, prompt in (("a", 10), ("b", 10), ("c", 4)):
            place(scheduler, name, 0, prompt)
        assert names(scheduler.schedule(0.0).requests) == batch


@pytest.mark.parametrize(("blocks", "batch", "reserve"), [(160, 4, 4), (160, 16, 16), (160, 40, 20), (16, 16, 2)])
def test_artifact_reserves_a_block_for_each_place(blocks: int, batch: int, reserve: int) -> None:
    scheduler = artifact(num_gpu_blocks=blocks, max_batch_size=batch)
    place(scheduler, "a", 0.0, 60)  # 15 blocks, and no matter.
    # The artifact knows no upper bound; ours is an eighth of the pool, or a small cache would stay empty.
    assert scheduler.mover.reserve(0.0) == reserve


def fill_the_gpu(scheduler: Scheduler) -> Request:
    """Place requests that take all 16 blocks, in three queues; return one of the first queue that is swapped out."""
    away = place(scheduler, "away", 0, 3, SWAPPED_OUT, level=0)
    for name, level, prompt in (("a", 0, 7), ("b", 0, 7), ("x", 1, 15), ("y", 2, 15), ("z", 2, 15)):
        place(scheduler, name, 0, prompt, RESIDENT, level)
    return away


def test_artifact_swaps_out_the_tail_of_the_lowest_queue() -> None:
    scheduler = waiting(num_gpu_blocks=16, max_batch_size=2)
    kv = scheduler.kv
    away = fill_the_gpu(scheduler)
    # 16 of 16 blocks are taken, 2 are to be kept: z, 4 blocks, goes. Nobody comes in.
    iteration = scheduler.schedule(0.0)
    assert names(iteration.requests) == ("a", "b")
    assert names(transfer.request for transfer in iteration.swap_out) == ("z",)
    assert iteration.swap_in == ()
    # While it is on its way nothing else has to go, and then there is room for who is away, beside the reserve.
    again = scheduler.schedule(0.0)
    assert again.swap_out == again.swap_in == ()
    scheduler.complete(iteration.swap_out[0], 0.0)
    third = scheduler.schedule(0.010)
    assert third.swap_out == ()
    assert names(transfer.request for transfer in third.swap_in) == ("away",)
    assert kv.location(away) is Location.SWAPPING_IN
    assert kv.num_free_gpu_blocks == 3


def test_artifact_swaps_in_in_queue_order() -> None:
    scheduler = waiting(num_gpu_blocks=32, max_batch_size=3)
    # Last in level 2 first to be placed: the order is by queue, not by who went first. 1 block each; 3 are kept.
    for name, level in (("e", 2), ("d", 1), ("c", 1), ("b", 0), ("a", 3)):
        place(scheduler, name, 0, 3, SWAPPED_OUT, level)
    # No more than a batch at once.
    iteration = scheduler.schedule(0.0)
    assert names(transfer.request for transfer in iteration.swap_in) == ("b", "d", "c")


def test_artifact_swaps_in_no_request_that_would_take_the_reserve_or_overtake() -> None:
    scheduler = waiting(num_gpu_blocks=16, max_batch_size=2)
    big = place(scheduler, "big", 0, 11, SWAPPED_OUT, level=1)  # 3 blocks
    place(scheduler, "small", 0, 3, SWAPPED_OUT, level=2)  # 1 block
    place(scheduler, "runs", 0, 47, RESIDENT, level=0)  # 12 blocks of 16
    iteration = scheduler.schedule(0.0)
    # 4 are free, 2 of them kept. big does not fit, and small, behind it, is not looked at.
    assert iteration.swap_in == iteration.swap_out == ()
    assert scheduler.kv.location(big) is Location.HOST


def test_artifact_swaps_out_a_request_that_is_due_and_found_no_room() -> None:
    """Where every request is due, caches would be dropped otherwise."""
    scheduler = waiting(num_gpu_blocks=8, max_batch_size=4)
    # 8 of 8 blocks are taken, and each needs another for its next token.
    for name in "ab":
        place(scheduler, name, 0, 16, RESIDENT)
    iteration = scheduler.schedule(0.0)
    assert iteration.requests == iteration.dropped == ()
    assert names(transfer.request for transfer in iteration.swap_out) == ("b",)


@pytest.mark.parametrize(("gate", "starts"), [(0.1, False), (0.05, True), (0, True)])
@pytest.mark.parametrize("wait", [False, True])
def test_artifact_starts_no_request_while_the_host_is_nearly_full(gate: float, starts: bool, wait: bool) -> None:
    options = {"admission_gate": gate, "wait_for_swaps": wait}
    scheduler = artifact(options, num_gpu_blocks=80, num_host_blocks=60, max_batch_size=2)
    place(scheduler, "away", 0, 4 * 56, SWAPPED_OUT, level=2)  # Leaves 4 of 60 blocks: 7 %.
    place(scheduler, "new", 0, 8, level=0)
    place(scheduler, "runs", 0, 7, RESIDENT, level=1)
    lost = place(scheduler, "lost", 0, 8, level=1)
    lost.num_tokens += 1  # It has run, and lost its cache.
    assert names(scheduler.schedule(0.0).requests) == (("new", "runs") if starts else ("runs", "lost"))


def test_artifact_runs_a_swapped_out_request_at_once() -> None:
    scheduler = artifact(num_gpu_blocks=16, max_batch_size=2)
    kv = scheduler.kv
    away = fill_the_gpu(scheduler)
    # No block is free; 1 is needed and 2 are to be kept. z leaves 4, and its room is there.
    iteration = scheduler.schedule(0.0)
    assert names(iteration.requests) == ("away", "a")
    assert names(transfer.request for transfer in iteration.swap_in) == ("away",)
    assert names(transfer.request for transfer in iteration.swap_out) == ("z",)
    assert kv.location(away) is Location.GPU
    assert (kv.num_free_gpu_blocks, kv.num_transfers) == (3, 0)
    # When the copies end, nothing changes.
    for transfer in (*iteration.swap_in, *iteration.swap_out):
        scheduler.complete(transfer, 0.001)
    kv.check_invariants()
    assert kv.num_free_gpu_blocks == 3


@pytest.mark.parametrize("gate", [-0.1, 1.5])
def test_a_gate_is_a_share(gate: float) -> None:
    with pytest.raises(ConfigError, match="admission_gate must be a share from 0 to 1, got"):
        artifact({"admission_gate": gate})


def test_a_real_engine_waits_for_its_copies() -> None:
    llm = pytest.importorskip("fastserve.llm")
    with pytest.raises(ConfigError, match=r"'fastserve-artifact': wait_for_swaps=false.*set wait_for_swaps=true"):
        llm.LLM("opt-tiny", load_format="dummy", policy="fastserve-artifact")
