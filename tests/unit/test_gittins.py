"""The policy `gittins`: what it learns, the index, its queue, and what it decides."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Request
from fastserve.engine import Engine
from fastserve.kvcache import Direction
from fastserve.policies.gittins.index import GittinsIndex
from fastserve.policies.gittins.lengths import LengthHistory, Stages, kind_of_prompt, prompt_of_kind
from fastserve.policies.gittins.policy import STAGES, Gittins
from fastserve.policies.gittins.queue import FIRST_OF_ALL, Index, IndexQueue
from fastserve.scheduler.queue import Wanted
from support.engines import arrival, make_engine
from support.profiles import share
from support.watch import names, watch

LAST = len(STAGES) - 1


# -- stages and kinds --------------------------------------------------------------------------------------------------


def test_stages_cover_every_length_once() -> None:
    assert STAGES.starts[:8] == [0, 1, 2, 3, 4, 6, 9, 14]
    assert STAGES.ends[:-1] == STAGES.starts[1:]
    for num_tokens in (1, 2, 4, 5, 6, 7, 100, 4096, 131_072):
        stage = STAGES.stage_of_finished(num_tokens)
        assert STAGES.starts[stage] < num_tokens <= STAGES.ends[stage]
        assert abs(STAGES.final_lengths[stage] - num_tokens) <= STAGES.tokens_through[stage] / 2
    assert STAGES.stage_of_finished(10**9) == LAST


def test_kinds_are_two_for_each_doubling() -> None:
    assert [kind_of_prompt(n) for n in (1, 2, 3, 4, 100, 1024, 1449)] == [0, 2, 3, 4, 13, 20, 21]
    assert all(kind_of_prompt(prompt_of_kind(kind)) == kind for kind in range(4, 34))


# -- what is learned ---------------------------------------------------------------------------------------------------


def taught(lengths: list[int], memory: float = 1e9, **worth: float) -> LengthHistory:
    history = LengthHistory(STAGES, memory, **worth)
    history.add_kind()
    for length in lengths:
        teach(history, length)
    return history


def teach(history: LengthHistory, length: int, kind: int = 0) -> None:
    for stage in range(STAGES.stage_of_finished(length)):
        history.passed(kind, stage)
    history.finished(kind, STAGES.stage_of_finished(length))


def survival(hazards: np.ndarray) -> np.ndarray:
    """The share that reaches each stage."""
    return np.concatenate(([1.0], np.cumprod(1 - hazards[:-1])))


def test_hazards_are_those_of_what_finished() -> None:
    lengths = [1, 1, 2, 5, 5, 6, 30, 30, 30, 200]
    reaching = survival(taught(lengths, worth_of_all=1e-9, worth_of_prior=1e-9).hazards(0))
    for stage in range(STAGES.stage_of_finished(200) + 1):
        assert reaching[stage] == pytest.approx(np.mean([length > STAGES.starts[stage] for length in lengths]))


def test_those_still_running_count_as_far_as_they_have_come() -> None:
    # Half are of 10 tokens and half of 1,000, and only the short have finished. Were the finished alone counted,
    # nobody would be expected to come further than 10.
    history = taught([10] * 50, worth_of_all=1e-9, worth_of_prior=1e-9)
    for _ in range(50):
        for stage in range(STAGES.stage_of_finished(60)):
            history.passed(0, stage)
    reaching = survival(history.hazards(0))
    assert reaching[STAGES.stage_of_finished(30)] == pytest.approx(0.5)


def test_the_prior_is_that_of_least_attained_service() -> None:
    # Whoever has come further is less likely to finish with the next token, and is worth less.
    hazards = taught([]).hazards(0)
    of_a_token = 1 - (1 - hazards) ** (1 / STAGES.tokens_through)
    assert all(earlier > later for earlier, later in itertools.pairwise(of_a_token[:-1]))
    for length_power in (0.0, 1.0, 3.0):
        weights = index_of(hazards, length_power=length_power).log_weights[1:LAST, RESIDENT]
        assert all(earlier > later for earlier, later in itertools.pairwise(weights))


def test_the_newest_count_most() -> None:
    history = taught([10] * 1000, memory=100)
    for _ in range(300):
        teach(history, 500)
    reaching = survival(history.hazards(0))
    assert reaching[STAGES.stage_of_finished(400)] > 0.9
    forgets_nothing = taught([10] * 1000 + [500] * 300)
    assert survival(forgets_nothing.hazards(0))[STAGES.stage_of_finished(400)] < 0.3


def test_weights_that_grow_for_ever_stay_finite() -> None:
    history = taught([10, 500] * 3000, memory=10)
    assert history._weight < 1e101
    assert np.isfinite(history.hazards(0)).all()
    assert survival(history.hazards(0))[STAGES.stage_of_finished(100)] == pytest.approx(0.5, abs=0.06)


def test_a_kind_is_known_by_its_own_once_there_are_enough() -> None:
    history = taught([])
    history.add_kind()
    for _ in range(200):
        teach(history, 10, kind=0)
    of_all = survival(history.hazards(1))[STAGES.stage_of_finished(100)]
    assert of_all < 0.1, "nothing is known of the other kind but what is known of all"
    for _ in range(50):
        teach(history, 1000, kind=1)
    assert survival(history.hazards(1))[STAGES.stage_of_finished(100)] > 0.8
    assert survival(history.hazards(0))[STAGES.stage_of_finished(100)] < 0.1


# -- the index ---------------------------------------------------------------------------------------------------------


def index_of(hazards: np.ndarray, *, length_power: float = 0.0, setup: tuple[float, float, float] = (0, 0, 0)) -> Index:
    """A token takes a second of the machine, whoever's it is."""
    costs = np.tile(np.array(setup, dtype=float), (len(STAGES), 1))
    return GittinsIndex(STAGES, length_power, step_s=1.0).compute(hazards, np.ones(len(STAGES)), costs)


def hazards_of(shares: dict[int, float]) -> np.ndarray:
    """Of answers that have one of these lengths."""
    hazards = np.zeros(len(STAGES))
    left = 1.0
    for length, part in sorted(shares.items()):
        hazards[STAGES.stage_of_finished(length)] = part / left
        left -= part
    hazards[-1] = 1.0
    return hazards


def test_a_known_length_is_the_inverse_of_what_remains() -> None:
    index = index_of(hazards_of({1000: 1.0}))
    length = STAGES.final_lengths[STAGES.stage_of_finished(1000)]
    for stage in range(STAGES.stage_of_finished(1000)):
        assert math.exp(index.log_weights[1 + stage, RESIDENT]) == pytest.approx(1 / (length - STAGES.starts[stage]))
        assert index.leads_s[1 + stage, RESIDENT] == pytest.approx(length - STAGES.starts[stage])


def test_it_pays_to_give_up_after_the_short_ones() -> None:
    # Half of the answers are of 20 tokens, half of 1,000: serve up to 20, (1/2) / 20, not to the end, 1 / 510.
    index = index_of(hazards_of({20: 0.5, 1000: 0.5}))
    short, long = (STAGES.final_lengths[STAGES.stage_of_finished(n)] for n in (20, 1000))
    through = STAGES.ends[STAGES.stage_of_finished(20)]
    new = math.exp(index.log_weights[1, RESIDENT])
    assert new == pytest.approx(0.5 / (0.5 * short + 0.5 * through))
    # Past that it is known to be long, and worth less than a new one until it is nearly done.
    weights = np.exp(index.log_weights[1:, RESIDENT])
    known_long = STAGES.stage_of_finished(20) + 1
    assert weights[known_long] == pytest.approx(1 / (long - STAGES.starts[known_long]))
    assert weights[known_long] < new


def test_memoryless_lengths_are_worth_the_same_at_any_stage() -> None:
    hazard_of_token = 0.01
    hazards = 1 - (1 - hazard_of_token) ** STAGES.tokens_through
    hazards[-1] = 1.0
    weights = np.exp(index_of(hazards).log_weights[1:, RESIDENT])
    # A stage is taken to end in its middle, so not exactly; and where hardly anyone comes, the end is near.
    assert weights[: STAGES.stage_of_finished(400)] == pytest.approx(hazard_of_token, rel=0.25)
    of_slowdown = index_of(hazards, length_power=1.0).log_weights[1 : STAGES.stage_of_finished(400), RESIDENT]
    assert (np.diff(of_slowdown) < 0).all(), "the slowdown of those who have come far weighs less"


@share(1 / 4)
@given(
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.tuples(st.floats(0, 100), st.just(0.0), st.floats(0, 100)),
)
def test_the_index_is_the_best_of_all_stopping_stages(
    given_hazards: list[float], length_power: float, setup: tuple[float, float, float]
) -> None:
    stages = Stages(exact=4, ratio=2.0, longest=64)
    hazards = np.array([*given_hazards, *[0.5] * (len(stages) - 9), 1.0])
    costs = np.tile(np.array(setup), (len(stages), 1))
    index = GittinsIndex(stages, length_power, step_s=0.5).compute(hazards, np.ones(len(stages)), costs)
    hazards = np.minimum(hazards, [*[1 - 1e-12] * (len(stages) - 1), 1.0])
    for stage in range(len(stages)):
        for part in (NO_CACHE, RESIDENT, SWAPPED_OUT):
            best, lead = -math.inf, math.nan
            reaches, relief, later, cost = 1.0, 0.0, 0.0, setup[part]
            for last in range(stage, len(stages)):
                length = stages.final_lengths[last]
                value = reaches * hazards[last] * length**-length_power
                relief += value
                later += value * (length - stages.starts[stage]) * 0.5
                through = hazards[last] * (length - stages.starts[last])
                cost += reaches * (through + (1 - hazards[last]) * stages.tokens_through[last])
                reaches *= 1 - hazards[last]
                if relief / cost > best * (1 + 1e-9):
                    best, lead = relief / cost, later / relief if relief else math.nan
            assert math.exp(index.log_weights[1 + stage, part]) == pytest.approx(best, rel=1e-6)
            assert stages.final_lengths[stage] >= 0
            assert index.leads_s[1 + stage, part] > 0
            assert math.isnan(lead) or index.leads_s[1 + stage, part] <= 0.5 * stages.final_lengths[-1]


@pytest.mark.parametrize("exponent", [1, 3, 10])
@pytest.mark.parametrize("length", [1, 100_000])
def test_every_request_is_worth_something(exponent: float, length: int) -> None:
    history = taught([length] * 100)
    index = index_of(history.hazards(0), length_power=exponent)
    assert np.isfinite(index.log_weights).all()
    assert np.isfinite(index.leads_s).all()
    assert (index.leads_s > 0).all()


def test_what_must_be_spent_first_counts() -> None:
    hazards = hazards_of({100: 1.0})
    index = index_of(hazards, setup=(50.0, 0.0, 5.0))
    fresh, resident, away = np.exp(index.log_weights[1])
    assert resident > away > fresh
    assert 1 / fresh - 1 / resident == pytest.approx(50)
    assert 1 / away - 1 / resident == pytest.approx(5)


# -- the queue ---------------------------------------------------------------------------------------------------------


@share(1 / 10)
@given(st.data())
def test_every_walk_is_in_order_of_the_index(data: st.DataObject) -> None:
    num_levels, growth = 4, data.draw(st.sampled_from([0.0, 1.0, 2.0]))
    queue = IndexQueue(num_levels, growth, lambda request: kind_of_prompt(request.num_prompt_tokens))
    weights = st.floats(-3, 3)
    requests: list[Request] = []

    def weigh(kind: int) -> None:
        drawn = data.draw(st.lists(weights, min_size=3 * num_levels, max_size=3 * num_levels))
        queue.set_index(kind, Index(np.array(drawn).reshape(num_levels, 3), np.exp(drawn).reshape(num_levels, 3)))

    for kind in range(3):
        queue.add_kind()
        weigh(kind)
    at = 0.0
    for step in range(data.draw(st.integers(1, 25))):
        at += data.draw(st.sampled_from([0.0, 0.1, 3.0]))
        queue.now = at
        action = data.draw(st.sampled_from(["join", "join", "move", "refile", "remove", "weigh"]))
        if action == "join" or not requests:
            request = Request(f"{step}", at, data.draw(st.integers(1, 2)))
            requests.append(request)
            queue.join(request, data.draw(st.integers(1, num_levels - 1)))
        elif action == "weigh":
            weigh(data.draw(st.integers(0, 2)))
        else:
            request = data.draw(st.sampled_from(requests))
            if action == "move":
                queue.move(request, data.draw(st.integers(0, num_levels - 1)))
            elif action == "refile":
                request.cache_state = data.draw(st.sampled_from([NO_CACHE, RESIDENT, SWAPPED_OUT]))
                queue.refile(request)
            else:
                requests.remove(request)
                queue.remove(request)
        in_order = sorted(requests, key=queue.key)
        assert list(queue.in_order()) == in_order
        assert list(queue.candidates(Wanted(True, True))) == in_order
        assert list(queue.victims()) == [r for r in reversed(in_order) if r.cache_state == RESIDENT]
        assert list(queue.swapped_out()) == [r for r in in_order if r.cache_state == SWAPPED_OUT]
        assert queue.num_swapped_out == sum(r.cache_state == SWAPPED_OUT for r in requests)
        assert sum(sum(counts) for _, *counts in queue.sizes()) == len(requests)
        first = [r.level == FIRST_OF_ALL for r in in_order]
        assert first == sorted(first, reverse=True)
        for one in requests:
            for other in requests:
                assert queue.is_before(one, other) == (in_order.index(one) < in_order.index(other))


def test_a_long_line_stays_in_order_while_its_front_leaves_and_returns() -> None:
    queue = IndexQueue(3, 2.0, lambda request: 0)
    queue.add_kind()
    queue.set_index(0, Index(np.zeros((3, 3)), np.ones((3, 3))))
    requests = [Request(f"{i}", i / 8, 1) for i in range(200)]
    for request in requests:
        queue.join(request, 1)
    rng = np.random.default_rng(0)
    for _ in range(400):
        # Mostly the front.
        request = requests[int(200 * rng.random() ** 4)]
        queue.move(request, 3 - request.level)
        assert list(queue.in_order()) == requests
        queue.move(request, request.level)
    for i in range(199):
        queue.remove(requests[i])
        assert next(queue.in_order()) is requests[i + 1]
        assert len(queue) == 199 - i


@share(1 / 10)
@given(st.data())
def test_an_outlook_holds_as_long_as_no_other_request_comes_first(data: st.DataObject) -> None:
    num_levels, growth = 3, data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    queue = IndexQueue(num_levels, growth, lambda request: request.num_prompt_tokens)
    drawn = st.lists(st.floats(-3, 3), min_size=3 * num_levels, max_size=3 * num_levels)
    for kind in range(3):
        queue.add_kind()
        weights, leads = (np.array(data.draw(drawn)).reshape(num_levels, 3) for _ in range(2))
        queue.set_index(kind, Index(weights, np.exp(leads)))
    for i, (at, kind) in enumerate(data.draw(st.lists(st.tuples(st.floats(0, 4), st.integers(0, 2)), min_size=2))):
        request = Request(f"{i}", at, max(kind, 1))
        request.cache_state = RESIDENT
        queue.join(request, data.draw(st.integers(1, 2)))
    queue.now = 5.0
    num_chosen = data.draw(st.integers(1, len(queue) - 1))
    chosen = list(queue.in_order())[:num_chosen]
    outlook = queue.outlook(chosen)
    later = data.draw(st.floats(0, 50))
    if not (outlook.holds_at(5.0) and outlook.holds_at(5.0 + later)):
        return
    for share_of_time in np.linspace(0, 1, 20).tolist():
        queue.now = 5.0 + share_of_time * later
        assert set(list(queue.in_order())[:num_chosen]) == set(chosen)


def test_a_walk_that_wants_no_others_yields_only_requests_on_the_gpu() -> None:
    engine = make_engine("gittins")
    scheduler = engine.scheduler
    for i in range(6):
        engine.add_request(*arrival(f"{i}", 0, 8, 5))
    queue = scheduler.queue
    for i, request in enumerate(list(queue.in_order())[:4]):
        request.cache_state = RESIDENT if i % 2 else SWAPPED_OUT
        queue.refile(request)

    wanted = Wanted(True, True)
    seen = []
    for request in queue.candidates(wanted):
        seen.append(request.cache_state)
        wanted.without_cache = wanted.swapped_out = False
    assert seen.count(RESIDENT) == 2
    assert len(seen) <= 3


# -- decisions ---------------------------------------------------------------------------------------------------------


def warm(lengths: list[tuple[int, int]], options: dict[str, object] | None = None, **sizes: int) -> Engine:
    engine = make_engine("gittins", {"alpha_s": "none", **(options or {})}, **sizes)
    for prompt, output in lengths:
        engine.scheduler.policy.learn(prompt, output)
    return engine


def test_whose_answers_are_known_to_be_short_run_first() -> None:
    # Prompts of 8 have had answers of 3 tokens and prompts of 40 of 200.
    for objective in ("slowdown", "jct"):
        engine = warm([(8, 3), (40, 200)] * 50, {"objective": objective}, max_batch_size=1)
        log = watch(engine)
        engine.run([arrival("long", 0, 40, 50), arrival("short", 0.001, 8, 3)])
        assert log.done == ["short", "long"]


def test_one_found_to_be_long_makes_way_for_new_ones() -> None:
    # Answers are of 5 tokens or of 300. After 5 it is a long one, and those that come are short more likely than not.
    engine = warm([(8, 5), (8, 300)] * 50, {"objective": "jct"}, max_batch_size=1)
    log = watch(engine)
    engine.run([arrival("first", 0, 8, 60), arrival("second", 0.015, 8, 4), arrival("third", 0.016, 8, 5)])
    assert log.done == ["second", "third", "first"]
    # Where all are of 300, nobody gains from changing the order.
    engine = warm([(8, 300)] * 100, {"objective": "jct"}, max_batch_size=1)
    log = watch(engine)
    engine.run([arrival("first", 0, 8, 60), arrival("second", 0.015, 8, 4), arrival("third", 0.016, 8, 5)])
    assert log.done == ["first", "second", "third"]


def test_it_learns_from_what_it_serves() -> None:
    engine = make_engine("gittins", {"alpha_s": "none"})
    engine.run([arrival(f"{i}", 0.01 * i, 8, 3 if i % 2 else 120) for i in range(40)])
    history = engine.scheduler.policy.history
    assert history.num_finished == 40
    told = make_engine("gittins").scheduler.policy
    for length in (3, 120) * 20:
        told.learn(8, length)
    kind = kind_of_prompt(8)
    assert history.hazards(kind) == pytest.approx(told.history.hazards(kind), abs=0.02)


def test_an_aborted_request_counts_as_far_as_it_came() -> None:
    engine = make_engine("gittins", max_batch_size=1)
    engine.jumps = False
    engine.add_request(*arrival("a", 0, 8, 100))
    for _ in range(60):
        engine.step()
    scheduler = engine.scheduler
    stage = engine.jobs["a"].request.policy_state.stage
    engine.abort("a")
    assert scheduler.policy.history.num_finished == 0
    assert scheduler.policy.history._all_passed[:stage].tolist() == [1.0] * stage
    assert scheduler.policy.history._all_passed[stage:].sum() == 0


def test_the_price_of_a_swap_is_measured() -> None:
    engine = make_engine("gittins", {"swap": "proactive"}, num_gpu_blocks=30, max_batch_size=2)
    log = watch(engine)
    engine.run([arrival(f"{i}", 0.02 * i, 30, 40) for i in range(10)])
    assert log.transfers
    # A block of 4 tokens takes 1 ms each way.
    assert engine.scheduler.policy._token_transfer_s == pytest.approx(0.00025)
    weights = np.array(engine.scheduler.queue._log_weights).reshape(-1, 1 + len(STAGES), 3)[kind_of_prompt(30), 1:]
    assert (weights[:, RESIDENT] > weights[:, SWAPPED_OUT]).all()
    assert any(transfer.direction is Direction.IN for transfer in log.transfers)


def test_free_swapping_weighs_nothing() -> None:
    engine = make_engine("gittins", {"switching_cost": 0}, num_gpu_blocks=30, max_batch_size=2)
    engine.run([arrival(f"{i}", 0.02 * i, 30, 40) for i in range(10)])
    weights = np.array(engine.scheduler.queue._log_weights).reshape(-1, 1 + len(STAGES), 3)[kind_of_prompt(30), 1:]
    assert (weights[:, RESIDENT] == weights[:, SWAPPED_OUT]).all()


def test_a_token_costs_a_place_or_its_part_of_the_cache() -> None:
    # 4 places, 10 ms an iteration. The cache has 32 blocks of 4 tokens, of which 4 are kept free: 112 tokens are 28 for
    # each place. So a context of 56 tokens takes half of the machine, and one of 28 or less a quarter.
    engine = make_engine("gittins", {"prices_memory": True}, num_gpu_blocks=32)
    assert engine.scheduler.policy._price(56).of_token[0] == pytest.approx(0.010 / 2)
    assert engine.scheduler.policy._price(28).of_token[0] == pytest.approx(0.010 / 4)
    assert engine.scheduler.policy._price(7).of_token[0] == pytest.approx(0.010 / 4)
    # With room for all, memory costs nothing.
    engine = make_engine("gittins", {"prices_memory": True}, num_gpu_blocks=1000)
    assert engine.scheduler.policy._price(56).of_token[0] == pytest.approx(0.010 / 4)


def test_of_equal_answers_the_one_that_holds_less_memory_is_worth_more() -> None:
    def worth_of_long_prompt(prices_memory: bool) -> np.ndarray:
        """Index after a prompt of 64 tokens over that after one of 8, answers of 4 tokens, by stage, on the GPU."""
        lengths = [(64, 4), (8, 4)] * 200
        engine = warm(lengths, {"prices_memory": prices_memory, "alpha_s": "none"}, num_gpu_blocks=32)
        policy = engine.scheduler.policy
        for prompt, _ in lengths[:2]:
            policy._refresh(kind_of_prompt(prompt))
        weights = np.array(engine.scheduler.queue._log_weights).reshape(-1, 1 + len(STAGES), 3)[:, 1:4, RESIDENT]
        return np.exp(weights[kind_of_prompt(64)] - weights[kind_of_prompt(8)])

    assert worth_of_long_prompt(False) == pytest.approx(np.ones(3), rel=0.05)
    # A prompt in the middle of the kind has 76 tokens, and at most 4 are added: 2.7 to 2.9 places of 28 tokens each.
    assert prompt_of_kind(kind_of_prompt(64)) == 76
    assert ((worth_of_long_prompt(True) > 28 / 80) & (worth_of_long_prompt(True) < 28 / 76 * 1.05)).all()


def test_those_who_waited_too_long_come_first_only_if_they_fit_a_batch() -> None:
    for num_waiting, first in ((3, True), (9, False)):
        engine = make_engine("gittins", {"alpha_s": 0.3}, max_batch_size=4)
        scheduler = engine.scheduler
        for i in range(4):
            engine.add_request(*arrival(f"runs {i}", 0, 8, 500))
        for _ in range(3):
            engine.step()
        now = engine.clock.now()
        for i in range(num_waiting):
            engine.add_request(*arrival(f"waits {i}", now, 8, 500))
        scheduler.prepare(now + 0.31)
        assert len(scheduler.policy._starved) == num_waiting
        levels = {request.level for request in scheduler.policy._starved.values()}
        assert levels == ({FIRST_OF_ALL} if first else {1})
        if first:
            waiting = names(scheduler.policy._starved.values())
            assert set(waiting) <= set(names(scheduler.decide(now + 0.31).requests))


def test_promoted_ones_go_back_where_they_were_when_too_many_follow() -> None:
    engine = make_engine("gittins", {"alpha_s": 0.3}, max_batch_size=4)
    scheduler = engine.scheduler
    for i in range(4):
        engine.add_request(*arrival(f"{i}", 0, 8, 500))
    scheduler.prepare(0.4)
    assert {request.level for request in scheduler.policy._starved.values()} == {FIRST_OF_ALL}
    engine.add_request(*arrival("4", 0.05, 8, 500))
    scheduler.prepare(0.5)
    assert {request.level for request in scheduler.policy._starved.values()} == {1}


def test_age_wins_in_the_end() -> None:
    # A long one, and short ones that come faster than they can be served.
    def place_of_long(exponent: float) -> int:
        engine = warm([(8, 3), (40, 6)] * 50, {"exponent": exponent}, max_batch_size=1)
        log = watch(engine)
        engine.run([arrival("long", 0, 40, 6), *[arrival(f"{i}", 0.02 * i, 8, 3) for i in range(1, 200)]])
        return log.done.index("long")

    places = [place_of_long(exponent) for exponent in (1, 2, 6)]
    assert places == sorted(places, reverse=True)
    assert places[0] > 190 > 100 > places[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("exponent", 0.5),
        ("exponent", 11),
        ("exponent", "nan"),
        ("memory_requests", 0),
        ("memory_requests", "inf"),
        ("switching_cost", -1),
        ("alpha_s", 0),
        ("objective", "throughput"),
    ],
)
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        make_engine("gittins", {option: value})


def test_the_default_exponent_is_the_objectives() -> None:
    assert make_engine("gittins").scheduler.policy.exponent == 3
    assert make_engine("gittins", {"objective": "jct"}).scheduler.policy.exponent == 1
    assert make_engine("gittins", {"exponent": 2}).scheduler.policy.exponent == 2
    assert Gittins.learns
