"""The rows that a run writes as they come are those that it would write at its end."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastserve.engine import Arrival, Engine, IterationLog, Job
from fastserve.latency import load_profile
from fastserve.policies.settings import resolve_settings
from fastserve.simulation import simulated_engine
from harness.run.backends.in_process import arrivals_of
from harness.run.recorder import RunRecorder
from harness.run.results import RunFolder, iteration_table, request_table
from harness.run.summary import COUNTED, Summary
from harness.workload.workload import Workload, make_workload

NUM_REQUESTS = 120


class _Tables:
    """Keeps the rows of each table, in the pieces in which they come."""

    def __init__(self) -> None:
        self.requests: list[pa.Table] = []
        self.iterations: list[pa.Table] = []

    def append(self, name: str, rows: pa.Table) -> None:
        getattr(self, name).append(rows)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastserve.engine.engine", "harness.run.recorder", "harness.run.backends.in_process"):
        monkeypatch.setattr(f"{module}.CHUNK", 16)


def _engine(policy: str) -> Engine:
    options, settings = resolve_settings(policy, {"num_gpu_blocks": "400"})
    return simulated_engine(load_profile("a100-80g/opt-13b-tp1-swifttransformer"), policy, settings, options)


def _workload(rate: float) -> Workload:
    return make_workload("sharegpt", "poisson", rate, NUM_REQUESTS, seed=1)


@pytest.mark.parametrize(("policy", "rate"), [("fastserve-fcfs", 0.5), ("fastserve", 1.5)])
def test_rows_and_summary_are_those_of_jobs_that_were_kept(policy: str, rate: float) -> None:
    workload = _workload(rate)
    kept = _engine(policy)
    rows = [job.metrics for job in kept.run(arrivals_of(workload, None))]
    tables = _Tables()
    recorder = RunRecorder(tables)
    _engine(policy).run(arrivals_of(workload, None), recorder=recorder)
    recorder.finish()

    assert pa.concat_tables(tables.requests).equals(request_table(rows))
    assert pa.concat_tables(tables.iterations).equals(iteration_table(kept.iterations))
    assert recorder.num_iterations == len(kept.iterations)
    assert len(tables.requests) > 2
    assert recorder.tally.num_requests == NUM_REQUESTS
    at_once = Summary()
    at_once.add(rows)
    sums = {name: sum(getattr(row, column) for row in rows) for name, column in COUNTED.items()}
    assert recorder.summary() == at_once.result({"iterations": len(kept.iterations)} | sums)


def test_few_rows_are_held_at_a_load_that_the_engine_can_carry() -> None:
    engine, recorder = _engine("fastserve-fcfs"), RunRecorder(_Tables())
    held = []

    def arrivals() -> Iterator[Arrival]:
        for arrival in arrivals_of(_workload(0.1), None):
            held.append(recorder.num_held)
            yield arrival

    engine.run(arrivals(), recorder=recorder)
    assert len(held) == NUM_REQUESTS
    assert 16 <= max(held) <= 32  # 16 and those in the system.


def test_rows_of_a_burst_are_written_while_it_is_served() -> None:
    tables = _Tables()
    recorder = RunRecorder(tables)
    _engine("fastserve-fcfs").run(arrivals_of(_workload(1e6), None), recorder=recorder)
    assert recorder.num_held < 3 * 16
    assert all(len(rows) >= 16 for rows in tables.requests)


def test_an_interruption_during_a_write_is_noticed() -> None:
    class Stopped(_Tables):
        def append(self, name: str, rows: pa.Table) -> None:
            super().append(name, rows)
            if len(self.requests) == 2:
                self.requests.append(rows)
                raise KeyboardInterrupt

    recorder = RunRecorder(Stopped())
    with pytest.raises(KeyboardInterrupt):
        _engine("fastserve-fcfs").run(arrivals_of(_workload(0.1), None), recorder=recorder)
    assert not recorder.is_whole


def test_an_interruption_elsewhere_leaves_whole_tables(tmp_path: Path) -> None:
    def stop(job: Job) -> None:
        if job.request.request_id == "80":
            raise KeyboardInterrupt

    with RunFolder(tmp_path) as folder:
        recorder = RunRecorder(folder)
        with pytest.raises(KeyboardInterrupt):
            _engine("fastserve-fcfs").run(arrivals_of(_workload(0.1), None), stop, recorder)
        assert recorder.is_whole
        recorder.finish()
        folder.write(recorder.summary(), {"configuration": {}})
    rows = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    assert [row["request_id"] for row in rows] == [f"{i}" for i in range(NUM_REQUESTS)]
    assert 70 < recorder.tally.num_finished < 90
    assert {row["status"] for row in rows} == {"finished", "aborted"}
    assert len(pq.read_table(tmp_path / "iterations.parquet")) == recorder.num_iterations


def test_tables_without_rows_have_their_columns(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        recorder = RunRecorder(folder)
        recorder.finish()
        folder.write(recorder.summary(), {"configuration": {}})
    assert pq.read_table(tmp_path / "requests.parquet").equals(request_table([]))
    assert pq.read_table(tmp_path / "iterations.parquet").equals(iteration_table(IterationLog()))
