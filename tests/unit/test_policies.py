"""What each policy decides, worked out by hand on the latency model of support.engines."""

from collections.abc import Iterable

import pytest

from fastserve.core.errors import ConfigError
from fastserve.core.request import Request
from fastserve.engine import Arrival, Engine, Job
from fastserve.policies.discovery import find_policy, list_policies
from support.engines import arrival, make_engine
from support.watch import watch


def finish_times(engine: Engine, arrivals: Iterable[Arrival]) -> dict[str, float]:
    return {job.request.request_id: round(job.finished_s, 6) for job in engine.run(arrivals)}


def test_fcfs_runs_in_order_of_arrival_and_backfills_at_once() -> None:
    engine = make_engine("fastserve-fcfs", max_batch_size=1)
    # Prompt of 10: 20 ms and the first token; then 10 ms a token. a: 20 + 2 * 10; b follows, then c.
    times = finish_times(engine, [arrival("a", 0, 10, 3), arrival("b", 0.001, 10, 1), arrival("c", 0.002, 10, 1)])
    assert times == {"a": 0.040, "b": 0.060, "c": 0.080}


def test_fcfs_mixes_prompts_and_decoding() -> None:
    engine = make_engine("fastserve-fcfs")
    log = watch(engine)
    engine.run([arrival("a", 0, 10, 3), arrival("b", 0.001, 10, 2)])
    # a's prompt; then a's second token beside b's prompt; then both decode their last.
    assert log.batches == [("a",), ("a", "b"), ("a", "b")]


def test_vllm_runs_prompts_before_decoding() -> None:
    engine = make_engine("vllm")
    log = watch(engine)
    jobs = engine.run([arrival("a", 0, 10, 3), arrival("b", 0.001, 10, 2)])
    # a pauses while b's prompt runs alone: no mixing.
    assert log.batches == [("a",), ("b",), ("a", "b"), ("a",)]
    assert [job.preemptions for job in jobs] == [0, 0]
    assert jobs[0].max_token_gap_s == pytest.approx(0.030)


def test_skip_join_enters_by_first_iteration_time() -> None:
    engine = make_engine("fastserve", {"quantum_base_s": 0.010})
    levels = {}
    # First iterations of 11, 20, 21, 50 ms against quanta of 10, 20, 40, 80 ms.
    for prompt in (1, 10, 11, 40):
        request = arrival(str(prompt), 0, prompt, 5).request
        engine.scheduler.add(request)
        levels[prompt] = request.level
    assert levels == {1: 1, 10: 1, 11: 2, 40: 3}


def test_the_default_quantum_is_the_shortest_iteration() -> None:
    assert make_engine("fastserve").scheduler.policy.quanta[:3] == pytest.approx([0.010, 0.020, 0.040])


def test_a_short_job_overtakes_a_long_one() -> None:
    arrivals = [arrival("long", 0, 10, 20), arrival("short", 0.025, 10, 2)]
    fastserve = finish_times(make_engine("fastserve", {"alpha_s": "none"}, max_batch_size=1), arrivals)
    # long: prompt 20 ms uses its quantum in level 1, so it is in level 2 when short joins level 1 at 30 ms (the end of
    # long's second token). short: 20 ms, demoted to level 2 behind long, which has 30 ms of its 40 ms left: 3 tokens.
    # Then short's second token: 30 + 20 + 30 + 10 = 90 ms.
    assert fastserve["short"] == pytest.approx(0.090)
    arrivals = [arrival("long", 0, 10, 20), arrival("short", 0.025, 10, 2)]
    fcfs = finish_times(make_engine("fastserve-fcfs", max_batch_size=1), arrivals)
    assert fcfs["short"] == pytest.approx(0.240)
    assert fastserve["long"] == pytest.approx(0.240)


def test_demotion_skips_to_the_quantum_that_covers_the_next_iteration() -> None:
    engine = make_engine("fastserve", {"quantum_base_s": 0.010})
    scheduler = engine.scheduler
    request = arrival("a", 0, 1, 5).request
    scheduler.add(request)
    assert request.level == 1
    # Its next iteration computes 64 tokens: 74 ms, which level 3 (80 ms) is the first to cover.
    request.num_tokens = 64
    scheduler.policy.on_progress(request, 0.0, 0.020)
    assert request.level == 3
    # Service starts at 0 again.
    scheduler.policy.on_progress(request, 0.0, 0.079)
    assert request.level == 3


def test_a_request_that_waits_alpha_is_promoted() -> None:
    arrivals = [arrival("long", 0, 60, 40)] + [arrival(f"s{i}", 0.001 + i * 0.02, 9, 1) for i in range(30)]
    engine = make_engine("fastserve", {"alpha_s": 0.1}, max_batch_size=1)
    log = watch(engine)
    engine.run(arrivals)
    starved = make_engine("fastserve", {"alpha_s": "none"}, max_batch_size=1)
    starved_log = watch(starved)
    starved.run([arrival("long", 0, 60, 40)] + [arrival(f"s{i}", 0.001 + i * 0.02, 9, 1) for i in range(30)])
    # A stream of short jobs that keeps the server busy: without promotion, the long one runs when it has passed.
    runs_between = [i for i, batch in enumerate(log.batches[:30]) if batch == ("long",)]
    starved_between = [i for i, batch in enumerate(starved_log.batches[:30]) if batch == ("long",)]
    assert len(runs_between) > len(starved_between)


def test_promotion_keeps_the_place_of_one_already_at_the_top() -> None:
    engine = make_engine("fastserve", {"quantum_base_s": 0.1, "alpha_s": 0.05})
    first, second = arrival("a", 0, 1, 9).request, arrival("b", 0, 1, 9).request
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    engine.scheduler.prepare(0.06)
    assert [request.request_id for request in engine.scheduler.queue.in_order()] == ["a", "b"]


def test_swapping_delays_and_is_accounted() -> None:
    # 5 blocks of 4 tokens; each request grows to 16 tokens, 4 blocks. The quantum lets them take turns.
    options = {"quantum_base_s": 0.03, "alpha_s": 0.02, "swap": "reactive"}
    engine = make_engine("fastserve", options, num_gpu_blocks=5, max_batch_size=1)
    jobs = engine.run([arrival("a", 0, 8, 8), arrival("b", 0, 8, 8)])
    assert sum(job.swap_out_bytes for job in jobs) > 0
    assert sum(job.swapping_s for job in jobs) > 0
    stalled = sum(record.stalled_s for record in engine.iterations)
    assert stalled == pytest.approx(
        sum(job.swapping_s for job in jobs)
    )  # One chosen at a time: each stall is one job's.


def test_the_host_link_works_both_ways_at_once_and_in_order() -> None:
    engine = make_engine("fastserve-fcfs")
    executor, kv = engine.executor, engine.kv
    requests = [Request(name, 0.0, 8) for name in "abc"]
    for request in requests:
        kv.extend(request, 8)
        request.num_computed_tokens = 8
    from fastserve.scheduler import Iteration

    a, b, c = requests
    first = kv.begin_swap_out(a)
    executor.submit(Iteration(swap_out=(first,)))
    executor.wait(1.0)
    assert engine.clock.now() == pytest.approx(0.002)  # 2 blocks of 1 ms
    for finished in executor.finished_transfers():
        assert (finished.start_s, finished.end_s) == (0.0, pytest.approx(0.002))
        kv.complete(finished.transfer)
    executor.submit(Iteration(swap_out=(kv.begin_swap_out(b), kv.begin_swap_out(c)), swap_in=(kv.begin_swap_in(a),)))
    ends = []
    while executor.num_transfers_in_flight:
        executor.wait(1.0)
        for finished in executor.finished_transfers():
            assert finished.end_s == engine.clock.now()
            ends.append((finished.transfer.request.request_id, round(finished.end_s, 6)))
    # b out and a in side by side; c out after b.
    assert sorted(ends) == [("a", 0.004), ("b", 0.004), ("c", 0.006)]


def test_a_prompt_beyond_the_token_budget_runs_as_the_only_prompt() -> None:
    engine = make_engine("fastserve-fcfs", token_budget=16)
    log = watch(engine)
    engine.run([arrival("a", 0, 4, 3), arrival("b", 0, 40, 2), arrival("c", 0, 4, 1)])
    assert log.batches == [("a",), ("a", "b"), ("a", "b", "c")]


def test_policies_are_found_by_name_and_by_path() -> None:
    assert {"fastserve", "fastserve-fcfs", "vllm"} <= set(list_policies())
    assert find_policy("fastserve.policies.fcfs:FCFS").name == "fastserve-fcfs"
    with pytest.raises(ConfigError, match=r"unknown policy 'fcsf'; known: .*fastserve-fcfs"):
        find_policy("fcsf")
    with pytest.raises(ConfigError, match="cannot import policy 'nowhere:Policy'"):
        find_policy("nowhere:Policy")
    with pytest.raises(ConfigError, match="not a subclass"):
        find_policy("fastserve.core.clock:WallClock")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "1"}, "unknown option 'alpha' for policy 'fastserve'; valid options: swap, swap_budget_blocks"),
        ({"alpha_s": "-1"}, "alpha_s must be a finite number above 0, got -1.0"),
        ({"quantum_ratio": "1"}, "quantum_ratio must be above 1, got 1.0"),
        ({"num_levels": "0"}, "num_levels must be an integer of at least 1, got 0"),
        ({"swap": "sometimes"}, "swap must be one of proactive, reactive, recompute, none, got 'sometimes'"),
        ({"quantum_base_s": "nan"}, "quantum_base_s must be a finite number above 0, got nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_engine("fastserve", options)
    assert message in str(caught.value)


def test_a_scheduler_is_never_shown_the_output_length() -> None:
    engine = make_engine("fastserve", max_model_len=100)
    seen: list[Request] = []
    add = engine.scheduler.add

    def look_and_add(request: Request) -> None:
        seen.append(request)
        add(request)

    engine.scheduler.add = look_and_add
    jobs: list[Job] = engine.run([arrival("a", 0, 10, 7)])
    assert jobs[0].metrics.output_tokens == 7
    assert seen[0].max_output_tokens == 90  # The model's bound, not the 7 to come.
    assert 7 not in [getattr(seen[0], name) for name in ("num_prompt_tokens", "max_output_tokens")]
    assert not hasattr(seen[0], "params")
