"""What an observer is told, and what else may be asked of an engine that runs."""

import itertools
from collections import Counter, defaultdict
from typing import Any

import pytest

from fastserve.core.clock import WallClock
from fastserve.core.config import EngineOptions
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine import Arrival, Engine, EngineView, FinishedTransfer, Job, Observer, Observers
from fastserve.latency import load_profile
from fastserve.scheduler import Iteration
from fastserve.simulation import simulated_engine
from support.engines import arrival, make_engine

POLICIES = [
    ("fastserve", {"swap": "proactive", "alpha_s": 0.05}),
    ("mlfq", {"swap": "recompute", "alpha_s": 0.05}),
    ("srpt", {"swap": "reactive"}),
    ("vllm", {}),
    ("vllm-chunked", {"chunk_tokens": 6}),
    ("run-to-completion", {}),
]
NUM_REQUESTS = 14


def arrivals() -> list[Arrival]:
    return [arrival(f"{i}", 0.02 * i, 4 + 7 * (i % 4), 1 + 5 * (i % 6)) for i in range(NUM_REQUESTS)]


class Told(Observer):
    """Everything it is told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def on_arrival(self, job: Job) -> None:
        self.calls.append(("on_arrival", (job,)))

    def on_submit(self, iteration: Iteration) -> None:
        self.calls.append(("on_submit", (iteration,)))

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        self.calls.append(("on_iteration", (engine, iteration, start_s, end_s)))

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        self.calls.append(("on_token", (job, token, at_s, previous_s, job.request.status)))

    def on_stall(self, engine: EngineView, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        self.calls.append(("on_stall", (engine, stalled, start_s, end_s)))

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        self.calls.append(("on_swap_wait", (stalled, start_s, end_s)))

    def on_transfer(self, finished: FinishedTransfer) -> None:
        self.calls.append(("on_transfer", (finished,)))

    def on_done(self, job: Job) -> None:
        self.calls.append(("on_done", (job,)))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def observed(policy: str, options: dict[str, Any], observer: Observer) -> tuple[Engine, list[Job]]:
    """Requests in a cache that is too small for them."""
    engine = make_engine(policy, options, num_gpu_blocks=20, num_host_blocks=100, max_batch_size=3)
    engine.observer = observer
    return engine, engine.run(arrivals())


def test_several_observers_are_told_the_same_in_order() -> None:
    first, second = Told(), Told()
    order: list[str] = []

    class Noted(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_done(self, job: Job) -> None:
            order.append(self.name)

    observed("fastserve", {"swap": "reactive"}, Observers(Noted("a"), first, second, Noted("b")))
    assert first.calls == second.calls
    hooks = {name for name in vars(Observer) if name.startswith("on_")}
    assert {name for name, _ in first.calls} == hooks, "some hook was not called, or is not passed on"
    assert order == ["a", "b"] * NUM_REQUESTS


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_every_token_is_told_once_when_it_is_there(policy: str, options: dict[str, Any]) -> None:
    told = Told()
    _, jobs = observed(policy, options, told)
    times: dict[str, list[float]] = defaultdict(list)
    for job, _, at_s, previous_s, status in told.of("on_token"):
        so_far = times[job.request.request_id]
        assert previous_s == (so_far[-1] if so_far else None)
        so_far.append(at_s)
        # Whoever is told the last one knows it.
        is_last = len(so_far) == job.params.max_tokens
        assert status is (RequestStatus.FINISHED if is_last else RequestStatus.ACTIVE)
    for job in jobs:
        of_job = times[job.request.request_id]
        assert len(of_job) == job.request.num_output_tokens == job.params.max_tokens
        assert (of_job[0], of_job[-1]) == (job.first_token_s, job.last_token_s)
        assert job.max_token_gap_s == max((b - a for a, b in itertools.pairwise(of_job)), default=0.0)
        calls = [name for name, arguments in told.calls if arguments[0] is job]
        assert calls == ["on_arrival", *["on_token"] * len(of_job), "on_done"]


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_decisions_are_told_as_they_are_carried_out(policy: str, options: dict[str, Any]) -> None:
    told = Told()
    engine, jobs = observed(policy, options, told)
    submitted = [iteration for (iteration,) in told.of("on_submit")]
    # Those that run somebody are the iterations that end.
    assert [one for one in submitted if one.requests] == [iteration for _, iteration, _, _ in told.of("on_iteration")]
    assert sum(len(one.preempted) for one in submitted) == sum(job.preemptions for job in jobs)
    for direction in ("swap_out", "swap_in"):
        moved = sum(transfer.num_bytes for one in submitted for transfer in getattr(one, direction))
        assert moved == sum(getattr(job, f"{direction}_bytes") for job in jobs)
    lost = sum(drop.num_lost_tokens for one in submitted for drop in one.dropped)
    assert lost == sum(job.recomputed_tokens for job in jobs)
    assert engine.kv.num_free_gpu_blocks == 20


def test_an_aborted_request_has_no_more_tokens() -> None:
    engine = make_engine("fastserve-fcfs")
    engine.observer = told = Told()
    job = engine.add_request(*arrival("a", 0, 4, 50))
    engine.step()
    assert engine.abort("a")
    while engine.has_unfinished:
        engine.step()
    assert job.request.num_output_tokens == len(told.of("on_token")) < 50
    assert told.calls[-1] == ("on_done", (job,))


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_the_sizes_of_the_queues_are_of_those_in_them(policy: str, options: dict[str, Any]) -> None:
    seen: Counter[int] = Counter()

    class Counting(Observer):
        def on_submit(self, iteration: Iteration) -> None:
            queue = engine.scheduler.queue
            expected = Counter((request.level, int(request.cache_state)) for request in queue.in_order())
            found = {
                (level, part): count
                for level, *counts in queue.sizes()
                for part, count in enumerate(counts)
                if count
            }  # fmt: skip
            assert found == dict(expected)
            levels = [level for level, *_ in queue.sizes()]
            assert levels == sorted(set(levels))
            seen.update(part for _, part in expected)

    engine = make_engine(policy, options, num_gpu_blocks=20, num_host_blocks=100, max_batch_size=3)
    assert engine.scheduler.queue.sizes() == []
    engine.observer = Counting()
    engine.run(arrivals())
    assert engine.scheduler.queue.sizes() == []
    swaps = options.get("swap") in ("proactive", "reactive")
    assert set(seen) == ({0, 1, 2} if swaps else {0, 1})


@pytest.mark.parametrize("max_model_len", [None, 2, 40, 41, 42, 100])
@pytest.mark.parametrize("num_gpu_blocks", [1, 10])
def test_the_longest_request_is_the_longest_that_is_not_refused(max_model_len: int | None, num_gpu_blocks: int) -> None:
    engine = make_engine("fastserve", num_gpu_blocks=num_gpu_blocks, max_model_len=max_model_len)
    longest = engine.longest_request
    for prompt in range(1, longest):
        assert engine.rejection_reason("a", prompt, longest - prompt) == ""
        assert engine.rejection_reason("a", prompt, longest - prompt + 1).startswith("request a: prompt of ")
    # And it can be served.
    (job,) = engine.run([arrival("a", 0, longest - 1, 1)])
    assert job.request.status is RequestStatus.FINISHED


@pytest.mark.parametrize("token_ids", [(), (7, 300, 5)])
def test_in_real_time_each_token_says_its_place_in_the_output(token_ids: tuple[int, ...]) -> None:
    told, params = Told(), SamplingParams(max_tokens=12, ignore_eos=True)
    options = EngineOptions(max_batch_size=2, host_link_gb_per_s=1000.0)
    engine = simulated_engine(
        load_profile("a100-80g/opt-13b-tp1-swifttransformer"), "fastserve-fcfs", options=options, clock=WallClock(),
        token_ids=token_ids,
    )  # fmt: skip
    expected = [*token_ids * 4] or list(range(12))
    engine.observer = told
    prompts = {name: [7] * (i + 1) for i, name in enumerate("abc")}
    for name, prompt in prompts.items():
        engine.add_request(Request.from_tokens(name, engine.clock.now(), prompt), params)
    while engine.has_unfinished:
        engine.step()
    tokens: dict[str, list[int]] = defaultdict(list)
    for job, token, *_ in told.of("on_token"):
        tokens[job.request.request_id].append(token)
    assert tokens == dict.fromkeys(prompts, expected)
    assert all(job.request.token_ids == prompts[job.request.request_id] + expected for (job,) in told.of("on_done"))
    starts = [record.start_s for record in engine.iterations]
    assert all(later > earlier for earlier, later in itertools.pairwise(starts))
