import math
from collections.abc import Iterator

import pytest

from fastserve.core.errors import RankError
from fastserve.core.request import RequestStatus, SamplingParams
from fastserve.engine import Arrival, IterationLog, IterationRecord, Job
from fastserve.scheduler import Iteration
from fastserve.scheduler.iteration import IterationResult
from support.engines import arrival, make_engine


def test_one_request_takes_the_time_of_its_iterations() -> None:
    engine = make_engine("fastserve-fcfs")
    (job,) = engine.run([arrival("a", 0.5, 30, 4)])
    row = job.metrics
    assert (row.arrival_s, row.first_scheduled_s) == (0.5, 0.5)
    assert row.first_token_s == pytest.approx(0.540)  # 10 ms + 30 tokens of 1 ms
    assert row.finished_s == pytest.approx(0.570)
    assert row.execution_s == pytest.approx(0.070)
    assert row.queueing_s == pytest.approx(0.0)
    assert row.max_token_gap_s == pytest.approx(0.010)
    assert row.status == "finished"
    assert [record.num_scheduled_tokens for record in engine.iterations] == [30, 1, 1, 1]


def test_what_can_never_fit_is_rejected_with_its_numbers_and_the_rest_served() -> None:
    engine = make_engine("fastserve", num_gpu_blocks=4)
    done = []
    jobs = engine.run([arrival("a", 0, 8, 4), arrival("big", 0, 12, 6), arrival("b", 0, 12, 5)], done.append)
    assert [job.request.status for job in jobs] == [
        RequestStatus.FINISHED,
        RequestStatus.REJECTED,
        RequestStatus.FINISHED,
    ]
    assert jobs[1].error == (
        "request big: prompt of 12 tokens + output of up to 6 needs 5 cache blocks of 4 tokens, the GPU pool has 4; "
        "raise num_gpu_blocks or shorten the request"
    )
    assert math.isnan(jobs[1].metrics.finished_s)
    assert len(done) == 3


def test_the_models_context_bounds_a_request() -> None:
    engine = make_engine("fastserve", max_model_len=16)
    jobs = engine.run([arrival("a", 0, 12, 4), arrival("b", 0, 12, 5)])
    assert [job.metrics.status for job in jobs] == ["finished", "rejected"]
    assert "exceeds the model's context of 16 tokens" in jobs[1].error


def test_an_aborted_request_leaves_nothing_behind() -> None:
    engine = make_engine("fastserve-fcfs")
    for name in ("a", "b"):
        job = engine.add_request(arrival(name, 0, 8, 50).request, SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    engine.kv.check_invariants()
    while engine.has_unfinished:
        engine.step()
    assert job.metrics.status == "finished"
    assert engine.kv.num_free_gpu_blocks == 1000


def test_stop_tokens_end_a_request() -> None:
    engine = make_engine("fastserve-fcfs")
    # The simulated executor generates token 0 throughout.
    job = engine.add_request(arrival("a", 0, 8, 50).request, SamplingParams(max_tokens=50, stop_token_ids=(0,)))
    while engine.has_unfinished:
        engine.step()
    assert job.metrics.output_tokens == 1


@pytest.mark.parametrize("num_stages", [1, 2])
def test_an_executor_that_fails_ends_the_engine_and_keeps_what_was_finished(num_stages: int) -> None:
    engine = make_engine("fastserve-fcfs", num_stages=num_stages)
    engine.jumps = False
    collect, left = engine.executor.collect, iter(range(8))

    def collect_a_few() -> IterationResult:
        if next(left, None) is None:
            raise RankError("rank 1 is gone")
        return collect()

    engine.executor.collect = collect_a_few  # type: ignore[method-assign]
    arrivals = [arrival("a", 0, 8, 2), arrival("b", 0, 8, 50), arrival("c", 0, 8, 50), arrival("late", 900, 8, 2)]
    with pytest.raises(RankError, match="rank 1 is gone"):
        engine.run(arrivals)
    statuses = {job.request.request_id: job.request.status for job in engine.last_run}
    assert statuses == {"a": RequestStatus.FINISHED, "b": RequestStatus.FAILED, "c": RequestStatus.FAILED}
    assert [job.error for job in engine.last_run] == ["", "rank 1 is gone", "rank 1 is gone"]
    assert not engine.has_unfinished
    with pytest.raises(RankError, match="rank 1 is gone"):
        engine.add_request(*arrival("d", 0, 8, 2))


def test_a_policy_that_schedules_nothing_is_reported_as_its_bug() -> None:
    engine = make_engine("fastserve-fcfs")
    engine.scheduler.decide = lambda now: Iteration()
    with pytest.raises(RuntimeError, match="policy 'fastserve-fcfs' schedules nothing although 1 requests wait"):
        engine.run([arrival("a", 0, 8, 2)])


def test_iterations_record_the_system() -> None:
    engine = make_engine("fastserve-fcfs", max_batch_size=1)
    engine.run([arrival("a", 0, 8, 2), arrival("b", 0, 8, 1)])
    assert [record.num_waiting for record in engine.iterations] == [1, 1, 0]
    assert engine.iterations[0].free_gpu_blocks == 1000 - 2
    assert all(record.end_s > record.start_s for record in engine.iterations)


def test_the_same_id_twice_is_refused() -> None:
    engine = make_engine("fastserve-fcfs")
    engine.add_request(arrival("a", 0, 8, 2).request, SamplingParams())
    with pytest.raises(ValueError, match="already in the system"):
        engine.add_request(arrival("a", 0, 8, 2).request, SamplingParams())


class _Kept:
    """A recorder that keeps what it is given, and the length of each chunk of records."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.records: list[IterationRecord] = []
        self.chunks: list[int] = []

    def add_job(self, job: Job) -> None:
        self.jobs.append(job)

    def add_iterations(self, records: IterationLog) -> None:
        self.chunks.append(len(records))
        self.records += records


def test_a_recorder_takes_what_the_engine_keeps_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.engine.engine.CHUNK", 16)
    kept, taken, at_once = make_engine("fastserve"), make_engine("fastserve"), 0

    def requests() -> Iterator[Arrival]:
        nonlocal at_once
        for i in range(40):
            at_once = max(at_once, len(taken.jobs))
            yield arrival(f"{i}", 0.2 * i, 8, 12 + i % 7)
        yield arrival("too long", 9.0, 8000, 1)

    jobs = kept.run(requests())
    recorder = _Kept()
    assert taken.run(requests(), recorder=recorder) == taken.last_run == list(taken.iterations) == []
    assert [repr(job.metrics) for job in recorder.jobs] == [repr(job.metrics) for job in jobs]
    assert recorder.records == list(kept.iterations) == kept.iterations[:]
    assert len(recorder.chunks) > 10 > at_once
    assert max(recorder.chunks) < 16 + 24  # A step adds as many records as a jump has.


def test_an_interrupted_run_gives_its_recorder_every_request() -> None:
    def stop(job: Job) -> None:
        raise KeyboardInterrupt

    recorder = _Kept()
    with pytest.raises(KeyboardInterrupt):
        make_engine("fastserve-fcfs").run([arrival(f"{i}", 100 * i, 8, 4) for i in range(3)], stop, recorder)
    assert [job.metrics.status for job in recorder.jobs] == ["finished", "aborted", "aborted"]
    assert len(recorder.records) == 4


def test_a_recorder_needs_requests_in_order_of_arrival() -> None:
    with pytest.raises(ValueError, match=r"arrives at 1\.0 s follows one that arrives at 2\.5 s"):
        make_engine("fastserve-fcfs").run([arrival("a", 2.5, 8, 2), arrival("b", 1.0, 8, 1)], recorder=_Kept())
