"""Who moves when under each `swap` mode, worked out by hand on small pools. A block of 4 tokens moves in 1 ms."""

import itertools

import pytest

from fastserve.core.request import RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.engine import Engine
from fastserve.kvcache import Direction, Location
from fastserve.scheduler import Scheduler
from support.caches import place, start
from support.engines import arrival, make_engine
from support.watch import Moved, Watch, finish_ms, ms, names, watch

MLFQ = {"quantum_base_s": 0.010, "alpha_s": "none", "reserve": "none"}


def run(
    policy: str, options: dict, jobs: list[tuple[str, float, int, int]], **sizes: int
) -> tuple[Watch, list, Engine]:
    engine = make_engine(policy, options, **sizes)
    kept = watch(engine)
    return kept, engine.run([arrival(*job) for job in jobs]), engine


# -- the estimated next scheduled time -----------------------------------------------------------------------------


def two_places() -> Scheduler:
    """Quanta of 10, 20, 40, 80, 160 ms and two places in the batch."""
    options = {"quantum_base_s": 0.010, "num_levels": 5, "alpha_s": 0.3}
    return make_engine("fastserve", options, max_batch_size=2).scheduler


def test_expected_waits() -> None:
    scheduler = two_places()
    # First iterations of 20, 20, 40, 70, 160 ms: levels 1, 1, 2, 3, 4.
    for name, prompt in (("a", 10), ("b", 10), ("c", 30), ("d", 60), ("e", 150)):
        place(scheduler, name, 0.0, prompt)
    # Down to level 2, a and b each take a quantum of 20 ms: 2 * 20 / 2 places = 20.
    # To 3, each takes 20 + 40, c takes 40: (2 * 60 + 40) / 2 = 80.
    # To 4, each takes 20 + 40 + 80, c 40 + 80, d 80: (2 * 140 + 120 + 80) / 2 = 240.
    assert scheduler.policy.enst.expected_waits() == pytest.approx([0, 0, 0.020, 0.080, 0.240])
    # They follow the queues: with c, come to level 0 in front of all, 3 requests are above level 2, two of them in 1.
    # To 1, c takes 10: 10 / 2. To 2, a, b 20, c 10 + 20: 70 / 2. To 3, a, b 60, c 70: 190 / 2. To 4: + 3 * 80 + 80.
    third = next(request for request in scheduler.queue.in_order() if request.request_id == "c")
    scheduler.policy.on_starved(third, 0.0)
    assert scheduler.policy.enst.expected_waits() == pytest.approx([0, 0.005, 0.035, 0.095, 0.255])


def test_enst_is_the_smaller_of_promotion_and_execution() -> None:
    scheduler = two_places()
    a = place(scheduler, "a", 0.10, 10)
    b = place(scheduler, "b", 0.20, 10)
    c = place(scheduler, "c", 0.05, 30)
    d = place(scheduler, "d", 0.00, 60)
    e = place(scheduler, "e", 0.24, 60)

    def enst(now: float) -> dict[str, float]:
        return {r.request_id: scheduler.policy.need_order().key(r, now)[0] for r in (a, b, c, d, e)}

    # T_execute as above (e is in d's queue and counts for neither): 0, 0, 20, 80, 80 ms.
    # At 250 ms, T_promote is 300 ms after arrival: 150, 250, 100, 50, 290 ms.
    assert enst(0.25) == pytest.approx({"a": 0, "b": 0, "c": 0.020, "d": 0.050, "e": 0.080})
    # At 290 ms: 110, 210, 60, 10, 250.
    assert enst(0.29) == pytest.approx({"a": 0, "b": 0, "c": 0.020, "d": 0.010, "e": 0.080})


def test_one_that_runs_would_wait_alpha_if_it_stopped() -> None:
    scheduler = make_engine(
        "fastserve", {"quantum_base_s": 0.010, "num_levels": 5, "alpha_s": 0.05}, max_batch_size=1
    ).scheduler
    long = place(scheduler, "long", 0.0, 60)
    iteration = scheduler.schedule(0.0)
    assert names(iteration.requests) == ("long",)
    for name in "abc":
        place(scheduler, name, 0.0, 10)
    # Three in level 1 before level 3, one place: 3 * (20 + 40) = 180 ms, but promotion would come after 50.
    assert scheduler.policy.enst.expected_waits()[3] == pytest.approx(0.180)
    assert scheduler.policy.need_order().key(long, 0.0)[0] == pytest.approx(0.050)


def test_without_promotion_enst_is_execution_alone() -> None:
    scheduler = make_engine("fastserve", {"quantum_base_s": 0.010, "alpha_s": "none"}, max_batch_size=1).scheduler
    a, b = place(scheduler, "a", 0.0, 10), place(scheduler, "b", 0.0, 60)
    # a: 20 ms in level 1 and 40 in level 2 before b's level 3.
    assert [scheduler.policy.need_order().key(r, 99.0)[0] for r in (a, b)] == pytest.approx([0, 0.060])


def test_largest_enst_goes_out_first_and_smallest_comes_in_first() -> None:
    for part in (RESIDENT, SWAPPED_OUT):
        scheduler = two_places()
        # As in test_enst...: at 290 ms ENST is a 0, b 0, c 20, d 10, e 80 ms. d's promotion puts it before c.
        for name, at, prompt in (("a", 0.1, 10), ("b", 0.2, 10), ("c", 0.05, 30), ("d", 0.0, 60), ("e", 0.24, 60)):
            place(scheduler, name, at, prompt, part)
        order = ("a", "b", "d", "c", "e")  # a before b, as in their queue.
        if part == RESIDENT:
            assert names(scheduler.policy.need_order().victims(0.29)) == order[::-1]
        else:
            assert names(scheduler.policy.need_order().swapped_out(0.29)) == order


def test_ties_in_a_queue_are_broken_by_its_order() -> None:
    scheduler = two_places()
    for name in "abc":
        place(scheduler, name, 0.0, 10, SWAPPED_OUT)
    for name in "xyz":
        place(scheduler, name, 0.0, 10, RESIDENT)
    assert names(scheduler.policy.need_order().swapped_out(0.0)) == ("a", "b", "c")
    assert names(scheduler.policy.need_order().victims(0.0)) == ("z", "y", "x")


@pytest.mark.parametrize("part", [SWAPPED_OUT, RESIDENT])
def test_in_a_queue_too_an_early_promotion_counts(part: CacheState) -> None:
    scheduler = two_places()
    place(scheduler, "top", 0.0, 10)
    place(scheduler, "second", 0.0, 30)
    # Both in level 3, where T_execute is (60 + 40) / 2 = 50 ms. The front one has just been preempted: 300 ms to its
    # promotion. The one behind it has 10 ms left.
    front, behind = place(scheduler, "front", 0.0, 60, part), place(scheduler, "behind", 0.0, 60, part)
    start(scheduler, front, 0.0)
    scheduler.policy.on_progress(front, 0.28, 0.29)
    front.last_ran_s = 0.29
    scheduler._preempt([front], 0.29)
    assert [scheduler.policy.need_order().key(r, 0.29)[0] for r in (front, behind)] == pytest.approx([0.050, 0.010])
    if part == SWAPPED_OUT:
        assert names(scheduler.policy.need_order().swapped_out(0.29)) == ("behind", "front")
    else:
        assert names(scheduler.policy.need_order().victims(0.29)) == ("front", "behind")


@pytest.mark.parametrize(
    "policy", ["fastserve", "mlfq", "fixed-priority", "gittins", "srpt", "fastserve-fcfs", "fastserve-artifact"]
)
def test_both_walks_agree_with_the_key(policy: str) -> None:
    engine = make_engine(policy, {"swap": "proactive"}, max_batch_size=2)
    scheduler = engine.scheduler
    if scheduler.policy.needs_oracle:
        scheduler.policy.oracle = lambda request: 10
    for i, (name, prompt) in enumerate(zip("abcdef", (10, 30, 60, 10, 30, 60), strict=True)):
        place(scheduler, name, 0.04 * i, prompt, SWAPPED_OUT if i % 2 else RESIDENT)
    need = scheduler.policy.need_order()
    for now in (0.2, 0.25, 0.29, 0.35, 0.45):
        ups, downs = list(need.swapped_out(now)), list(need.victims(now))
        assert sorted(names(ups)) == ["b", "d", "f"]
        assert sorted(names(downs)) == ["a", "c", "e"]
        assert ups == sorted(ups, key=lambda r: need.key(r, now))
        assert downs == sorted(downs, key=lambda r: need.key(r, now), reverse=True)


# -- the reserve ---------------------------------------------------------------------------------------------------


def test_the_reserve_follows_the_arrivals_of_the_last_second() -> None:
    scheduler = make_engine("fastserve", num_gpu_blocks=160, max_batch_size=4).scheduler
    swapping = scheduler.mover
    assert swapping.reserve(0.0) == 4  # A block for each place in the batch.
    place(scheduler, "a", 0.0, 10)  # 3 blocks
    place(scheduler, "b", 0.5, 4)  # 1 block
    assert swapping.reserve(0.6) == 4 + 3 + 1
    assert swapping.reserve(1.0) == 4 + 3 + 1
    assert swapping.reserve(1.1) == 4 + 1
    assert swapping.reserve(1.6) == 4
    # Never more than an eighth: 20 of 160. Ten prompts of 3 blocks would be 34.
    for i in range(10):
        place(scheduler, f"c{i}", 2.0, 10)
    assert swapping.reserve(2.0) == 20
    assert swapping.reserve(3.5) == 4


def test_the_reserve_has_a_window() -> None:
    scheduler = make_engine("fastserve", {"reserve_window_s": 0.2}, num_gpu_blocks=160).scheduler
    place(scheduler, "a", 0.0, 10)
    assert [scheduler.mover.reserve(now) for now in (0.1, 0.3)] == [7, 4]


@pytest.mark.parametrize(
    ("reserve", "blocks", "expected"),
    [("batch", 160, 4), ("batch", 16, 2), ("history", 16, 2), ("none", 160, 0), ("history", 7, 0)],
)
def test_other_reserves_and_small_pools(reserve: str, blocks: int, expected: int) -> None:
    scheduler = make_engine("fastserve", {"reserve": reserve}, num_gpu_blocks=blocks, max_batch_size=4).scheduler
    for i in range(3):
        place(scheduler, str(i), 0.0, 1)
    # Three prompts of a block each, and four places in the batch, at most an eighth of the pool.
    assert scheduler.mover.reserve(0.0) == expected


def test_the_reserve_is_filled_up_beside_the_computation() -> None:
    # 16 blocks: an eighth is 2, and one place in the batch reserves 1. Two requests of 8 blocks fill the pool.
    options = {**MLFQ, "reserve": "batch"}
    kept, _, _ = run("fastserve", options, [("a", 0, 30, 3), ("b", 0, 30, 3)], num_gpu_blocks=16, max_batch_size=1)
    # 0-40 a, 40-80 b: its prompt takes the other 8 blocks. 0 are left and 1 is to be kept, so a's go while b runs.
    first = kept.transfers[0]
    assert first == Moved("a", Direction.OUT, 40, 48)
    assert overlaps(kept, first)


# -- transfers beside the computation ------------------------------------------------------------------------------


def overlaps(kept: Watch, moved: Moved) -> bool:
    return any(ran.start < moved.end and moved.start < ran.end for ran in kept.iterations)


THREE = [("A", 0, 8, 6), ("B", 0, 8, 6), ("C", 0, 8, 6)]
"""Quanta of 10, 20, 40, 80 ms. A first iteration takes 18 ms, so all join level 1, where another token (28 ms in all)
uses the quantum of 20 up; in level 2 come the four left, 10 ms each. 8 tokens are 2 blocks, 9 to 12 are 3, and the last
(13 computed) takes a fourth. One place in the batch, 7 blocks, no reserve."""


def test_proactive_moves_beside_the_computation() -> None:
    kept, jobs, _ = run("fastserve", {**MLFQ, "swap": "proactive"}, THREE, num_gpu_blocks=7, max_batch_size=1)
    # 0-28 A, 28-56 B in level 1. At 56 they hold 3 blocks each, 1 is free, C needs 2: out goes B, last in level 2, and
    # as it takes until 59, A runs meanwhile: 56-66. Then C in level 1: 66-94.
    # At 94 A holds 3, C 3, 1 is free; B is needed next after A, so C's place is exchanged for it: out 94-97, in 104-107
    # (decisions are taken between iterations), while A runs on: 94-124. So is C brought in while B runs 124-164.
    assert [(ran.names[0], ran.start, ran.end) for ran in kept.iterations if ran.names != ("A",)][:4] == [
        ("B", 28, 46),
        ("B", 46, 56),
        ("C", 66, 84),
        ("C", 84, 94),
    ]
    assert kept.transfers == [
        Moved("B", Direction.OUT, 56, 59),
        Moved("C", Direction.OUT, 94, 97),
        Moved("B", Direction.IN, 104, 107),
        Moved("C", Direction.IN, 124, 127),
    ]
    assert all(overlaps(kept, moved) for moved in kept.transfers)
    assert finish_ms(jobs) == {"A": 124, "B": 164, "C": 204}  # 3 * 68 ms of computation and not a moment lost.
    assert kept.stalls == []
    # C alone was due and could not run for a transfer: 56 to 66.
    assert [ms(job.swapping_s) for job in jobs] == [0, 0, 10]


def test_reactive_waits_for_each_transfer() -> None:
    kept, jobs, _ = run("fastserve", {**MLFQ, "swap": "reactive"}, THREE, num_gpu_blocks=7, max_batch_size=1)
    # 0-28 A, 28-56 B; C finds 1 of 2 blocks, B goes, all wait: 56-59. 59-87 C. A, with 3 blocks of 7 and C with 3,
    # takes the seventh for its last token: 87-127. Its end makes room for B, which comes in: 127-130, and runs 130-170;
    # C is still there: 170-210.
    assert kept.transfers == [Moved("B", Direction.OUT, 56, 59), Moved("B", Direction.IN, 127, 130)]
    assert not any(overlaps(kept, moved) for moved in kept.transfers)
    assert kept.stalls == [(56, 59, ("C",)), (127, 130, ("B",))]
    assert finish_ms(jobs) == {"A": 127, "B": 170, "C": 210}
    assert [ms(job.swapping_s) for job in jobs] == [0, 3, 3]


TWO = [("A", 0, 20, 4), ("B", 0.005, 10, 3)]
"""A: 30 ms, level 2. B: 20 ms, level 1. A takes 5 blocks, 6 from its second token on; B 3. Of 7, never both."""


def test_reactive_by_hand() -> None:
    kept, jobs, _ = run("fastserve", {**MLFQ, "swap": "reactive"}, TWO, num_gpu_blocks=7, max_batch_size=1)
    # 0-30 A (30 of 40 ms used). 30-35 A's 5 blocks out. 35-55 B; 20 of 20 ms, to level 2 behind A. 55-58 B's 3 blocks
    # out, then 58-63 A's 5 in. 63-73 A: 40 of 40, level 3. 73-79 A's 6 blocks (21 tokens) out, 79-82 B's 3 in, 82-102
    # B: two tokens, done. 102-108 A's 6 in, 108-128 A's last two.
    assert [(ran.names[0], ran.start, ran.end) for ran in kept.iterations] == [
        ("A", 0, 30),
        ("B", 35, 55),
        ("A", 63, 73),
        *[("B", 82, 92), ("B", 92, 102)],
        *[("A", 108, 118), ("A", 118, 128)],
    ]
    a, b = jobs
    assert (ms(a.swapping_s), ms(b.swapping_s)) == (8 + 6, 5 + 9)  # A: 55-63, 102-108; B: 30-35, 73-82.
    assert (ms(a.execution_s), ms(b.execution_s)) == (60, 40)
    assert (ms(a.metrics.queueing_s), ms(b.metrics.queueing_s)) == (128 - 60 - 14, 97 - 40 - 14)
    assert a.swap_out_bytes == a.swap_in_bytes == (5 + 6) * 4 * 250
    assert b.swap_out_bytes == b.swap_in_bytes == 3 * 4 * 250
    assert (a.preemptions, b.preemptions) == (2, 1)


def test_a_batch_that_caches_move_for_stays_chosen_until_they_have_arrived() -> None:
    # As above until 55, when B's cache leaves for A's, which comes in 58-63. D comes at 60, of level 1, before A: that
    # changes nothing until 63. Then it is D's turn, for all that was moved: A's 5 blocks out 63-68, D 68-83.
    jobs = [*TWO, ("D", 0.060, 5, 1)]
    kept, _, _ = run("fastserve", {**MLFQ, "swap": "reactive"}, jobs, num_gpu_blocks=7, max_batch_size=1)
    assert kept.stalls[1:5] == [(55, 58, ("A",)), (58, 60, ("A",)), (60, 63, ("A",)), (63, 68, ("D",))]
    assert [(ran.names[0], ran.start, ran.end) for ran in kept.iterations[2:4]] == [("D", 68, 83), ("A", 88, 98)]


def test_recompute_drops_and_computes_again() -> None:
    kept, jobs, _ = run("fastserve", {**MLFQ, "swap": "recompute"}, TWO, num_gpu_blocks=7, max_batch_size=1)
    # 0-30 A; 30-50 B instead, A's 20 tokens are lost. 50-81 A again: 21 tokens, 31 ms, and B's 10 are lost; 61 of 40 ms
    # used: level 3. 81-102 B: 11 tokens (A's 21 are lost), 21 of 40 ms used; 102-112 its last. 112-144 A: 22 tokens;
    # 144-154 its last.
    assert [(ran.names[0], ran.end, ran.tokens[0]) for ran in kept.iterations] == [
        *[("A", 30, 20), ("B", 50, 10), ("A", 81, 21), ("B", 102, 11), ("B", 112, 1), ("A", 144, 22), ("A", 154, 1)]
    ]
    assert kept.drops == [("A", 20), ("B", 10), ("A", 21)]
    assert kept.transfers == kept.stalls == []
    assert [job.recomputed_tokens for job in jobs] == [41, 10]
    assert [ms(job.execution_s) for job in jobs] == [30 + 31 + 32 + 10, 20 + 21 + 10]


def test_none_takes_nobodys_cache() -> None:
    kept, jobs, _ = run("fastserve", {**MLFQ, "swap": "none"}, TWO, num_gpu_blocks=7, max_batch_size=1)
    # B is due at 30, finds 2 of 3 blocks free and waits until A has ended.
    assert kept.batches == [("A",)] * 4 + [("B",)] * 3
    assert kept.drops == kept.transfers == kept.stalls == []
    assert finish_ms(jobs) == {"A": 60, "B": 100}
    assert [job.preemptions for job in jobs] == [0, 0]


def test_none_drops_only_where_all_wait_for_each_other() -> None:
    # Two of 8 + 10 tokens and two places, in 6 blocks: with 12 tokens each they have taken all, and neither can go on.
    # The first in order gets the room of the other. Prompts 0-26, four more tokens until 66 (9 to 12 computed); A goes
    # on alone for the five it lacks: 66-116. B computes its 12 and the thirteenth: 23 ms, then four more: 116-139-179.
    for policy in ("fastserve-fcfs", "fastserve"):
        options = {"swap": "none"} if policy == "fastserve-fcfs" else {**MLFQ, "swap": "none"}
        kept, jobs, _ = run(policy, options, [("A", 0, 8, 10), ("B", 0, 8, 10)], num_gpu_blocks=6, max_batch_size=2)
        assert kept.drops == [("B", 12)]
        assert finish_ms(jobs) == {"A": 116, "B": 179}
        assert kept.transfers == kept.stalls == []


MANY = [(f"{i}", 0.02 * i, 4 + 7 * (i % 4), 8 + 5 * (i % 5)) for i in range(14)]
"""More than 24 blocks hold at once."""
PROACTIVE = ["fastserve", "mlfq", "fixed-priority", "gittins", "srpt", "fastserve-fcfs", "fastserve-artifact"]


@pytest.mark.parametrize("policy", PROACTIVE)
@pytest.mark.parametrize("budget", [1, 4, 8])
def test_the_budget_bounds_what_is_on_its_way(policy: str, budget: int) -> None:
    options = {"swap": "proactive", "swap_budget_blocks": budget}
    if policy == "fastserve-artifact":
        options["wait_for_swaps"] = True
    engine = make_engine(policy, options, num_gpu_blocks=24, max_batch_size=3)
    kv, submit = engine.kv, engine.executor.submit
    largest = 0
    seen = []

    def submit_and_look(iteration: object) -> None:
        nonlocal largest
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            largest = max(largest, kv.num_blocks(transfer.request))
        seen.append((kv.num_vacating_blocks, kv.num_arriving_blocks))
        submit(iteration)

    engine.executor.submit = submit_and_look
    engine.run([arrival(*job) for job in MANY])
    most_out, most_in = (max(counts) for counts in zip(*seen, strict=True))
    # A transfer starts only while fewer than the budget are on their way, and then goes as a whole.
    assert 0 < most_in <= budget - 1 + largest
    # What the artifact lacks room for goes out at once, whatever is on its way.
    assert policy == "fastserve-artifact" or 0 < most_out <= budget - 1 + largest


@pytest.mark.parametrize("policy", PROACTIVE)
def test_the_batch_goes_on_while_caches_move(policy: str) -> None:
    kept, _, engine = run(policy, {"swap": "proactive"}, MANY, num_gpu_blocks=24, max_batch_size=3)
    beside = [moved for moved in kept.transfers if overlaps(kept, moved)]
    assert len(beside) > 0.5 * len(kept.transfers) > 0
    # The engine stood still only for transfers, and then had been told whom they hold up.
    assert sum(end - start for start, end, _ in kept.stalls) == pytest.approx(
        1000 * sum(record.stalled_s for record in engine.iterations)
    )


@pytest.mark.parametrize("policy", PROACTIVE)
def test_nothing_waits_for_a_transfer_it_does_not_need(policy: str) -> None:
    engine = make_engine(policy, {"swap": "proactive"}, num_gpu_blocks=24, max_batch_size=3)
    kept, kv = watch(engine), engine.kv
    stalls = 0

    def nobody_could_run(engine: Engine, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        nonlocal stalls
        stalls += 1
        for request in engine.scheduler.queue.in_order():
            resident = kv.location(request) is Location.GPU
            assert not resident or kv.blocks_to_hold(request, request.num_tokens) > kv.num_free_gpu_blocks

    kept.on_stall = nobody_could_run
    engine.run([arrival(*job) for job in MANY])
    assert kept.transfers


# -- accounting ----------------------------------------------------------------------------------------------------

CASES = [
    *itertools.product(PROACTIVE, ["proactive", "reactive", "recompute", "none"]),
    *[("vllm", "reactive"), ("vllm", "recompute")],
]


@pytest.mark.parametrize(("policy", "swap"), CASES)
@pytest.mark.parametrize("host", [0, 12, 200])
def test_the_parts_of_a_jobs_time_add_up_and_swapping_is_waiting_for_a_transfer(
    policy: str, swap: str, host: int
) -> None:
    engine = make_engine(policy, {"swap": swap}, num_gpu_blocks=24, num_host_blocks=host, max_batch_size=3)
    kept, submit = watch(engine), engine.executor.submit
    charged: dict[str, float] = {}
    ran: dict[str, float] = {}

    def submit_and_look(iteration: object) -> None:
        # Due, and its cache away, or cleared room for by a transfer; and not among those that run.
        for request in iteration.stalled:
            assert request not in iteration.requests
            assert engine.kv.num_transfers or engine.kv.location(request) is Location.HOST
        submit(iteration)

    def on_iteration(engine: Engine, iteration: object, start_s: float, end_s: float) -> None:
        for request in iteration.stalled:
            charged[request.request_id] = charged.get(request.request_id, 0.0) + end_s - start_s
        for request in iteration.requests:
            ran[request.request_id] = ran.get(request.request_id, 0.0) + end_s - start_s

    def on_stall(engine: Engine, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        for request in stalled:
            charged[request.request_id] = charged.get(request.request_id, 0.0) + end_s - start_s

    engine.executor.submit = submit_and_look
    kept.on_iteration = on_iteration
    kept.on_stall = on_stall
    jobs = engine.run([arrival(*job) for job in MANY])
    for job in jobs:
        row = job.metrics
        assert row.status == "finished"
        assert row.queueing_s + row.swapping_s + row.execution_s == pytest.approx(row.finished_s - row.arrival_s)
        assert row.queueing_s > -1e-9
        assert row.swapping_s == pytest.approx(charged.get(row.request_id, 0.0))
        assert row.execution_s == pytest.approx(ran[row.request_id])
    if swap in ("recompute", "none") or not host:
        assert not charged
        assert not kept.transfers
    if swap == "recompute" and policy != "vllm":  # Three places and 24 blocks: vLLM has room for all it admits.
        assert sum(job.recomputed_tokens for job in jobs) > 0


# -- host memory full ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", PROACTIVE)
@pytest.mark.parametrize("host", [0, 3, 8])
def test_a_full_host_pool_means_recomputation_for_those_who_are_due(policy: str, host: int) -> None:
    engine = make_engine(policy, {"swap": "proactive"}, num_gpu_blocks=24, num_host_blocks=host, max_batch_size=3)
    kept = watch(engine)
    jobs = engine.run([arrival(*job) for job in MANY])
    assert all(job.metrics.status == "finished" for job in jobs)
    assert sum(job.recomputed_tokens for job in jobs) == sum(lost for _, lost in kept.drops)


def test_nothing_is_dropped_to_bring_someone_in_ahead_of_time() -> None:
    # THREE without host memory: where caches were exchanged ahead of time (at 94 and 104) nothing happens now.
    # 0-28 A, 28-56 B. C is due at 56 and finds 1 of 2 blocks: B, last in level 2, loses its 9 tokens. 56-84 C. 84-124
    # A. Then B: its 10 tokens at once, 20 ms, and 2 of the 3 that follow, until the quantum of 40 is used up: 124-164.
    # C has its four in level 2: 164-204; then B's last in level 3: 204-214.
    kept, jobs, _ = run(
        "fastserve", {**MLFQ, "swap": "proactive"}, THREE, num_gpu_blocks=7, num_host_blocks=0, max_batch_size=1
    )
    assert kept.drops == [("B", 9)]
    assert kept.transfers == kept.stalls == []
    assert finish_ms(jobs) == {"A": 124, "B": 214, "C": 204}
