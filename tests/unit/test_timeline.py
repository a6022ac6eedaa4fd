"""Timeline, told of a run by hand: what an engine would say, in the order in which it would."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve.core.config import CacheConfig
from fastserve.core.errors import OutputError
from fastserve.core.files import check_writable
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine import FinishedTransfer, Job, Timeline
from fastserve.kvcache import Direction, KVCacheManager, Transfer
from fastserve.scheduler import Iteration
from support.timelines import threads_of


class Run:
    """An engine's part: keeps jobs and cache, tells a timeline."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.jobs: dict[str, Job] = {}
        self.kv = KVCacheManager(CacheConfig(10, 6, 4, 250))

    def arrive(self, name: str, at: float, prompt: int = 4) -> Request:
        job = Job(Request(name, at, prompt), SamplingParams(max_tokens=100))
        self.jobs[name] = job
        self.timeline.on_arrival(job)
        return job.request

    def run(self, start: float, end: float, *requests: Request, stalled: tuple[Request, ...] = ()) -> None:
        tokens = tuple(request.num_tokens - request.num_computed_tokens for request in requests)
        iteration = Iteration(requests, tokens, stalled=stalled)
        self.timeline.on_iteration(self, iteration, start, end)  # type: ignore[arg-type]
        self.timeline.on_swap_wait(stalled, start, end)
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.num_tokens += 1

    def stall(self, start: float, end: float, *stalled: Request) -> None:
        self.timeline.on_stall(self, stalled, start, end)  # type: ignore[arg-type]
        self.timeline.on_swap_wait(stalled, start, end)

    def leave(self, request: Request, at: float, status: RequestStatus = RequestStatus.FINISHED) -> None:
        job = self.jobs.pop(request.request_id)
        request.status, job.finished_s = status, at
        self.kv.release(request)
        self.timeline.on_done(job)

    def transfer(self, request: Request, direction: Direction, start: float, end: float, num_bytes: int = 1000) -> None:
        self.timeline.on_transfer(FinishedTransfer(Transfer(request, direction, (), (), num_bytes), start, end))

    def spans(self, process: str, thread: str) -> list[tuple[str, float, float]]:
        """Name, start and end in milliseconds, in order, of one thread."""
        return [(e["name"], e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in self.events(process, thread)]

    def events(self, process: str, thread: str) -> list[dict[str, Any]]:
        return threads_of(self.timeline.events()).get((process, thread), [])

    def counter(self, name: str) -> list[tuple[float, dict[str, int]]]:
        events = self.timeline.events()
        return [(event["ts"] / 1e6, event["args"]) for event in events if event["ph"] == "C" and event["name"] == name]


def approx(*spans: tuple[str, float, float]) -> list[Any]:
    return [(name, pytest.approx(start, abs=1e-4), pytest.approx(end, abs=1e-4)) for name, start, end in spans]


def test_spans_tile_a_life() -> None:
    run = Run()
    a = run.arrive("a", 0.001)
    run.run(0.002, 0.010, a)
    run.run(0.010, 0.020, a)
    run.run(0.020, 0.030, run.arrive("b", 0.015), stalled=(a,))
    run.stall(0.030, 0.035, a)
    a.level = 2
    run.run(0.040, 0.050, a)
    run.leave(a, 0.050)
    assert run.spans("requests", "a") == approx(
        ("queueing", 1, 2),
        ("prefill", 2, 10),
        ("decode Q0", 10, 20),
        ("waiting for swap", 20, 35),
        ("queueing", 35, 40),
        ("decode Q2", 40, 50),
    )


def test_iterations_that_touch_in_one_queue_are_one_span() -> None:
    run = Run()
    a = run.arrive("a", 0.0)
    run.run(0.0, 0.1, a)
    now = 0.1
    for _ in range(10):
        run.run(now, now := now + 0.1, a)
    a.level = 1
    run.run(now, now + 0.1, a)
    run.run(now + 0.2, now + 0.3, a)
    spans = run.events("requests", "a")
    assert [(span["name"], span["args"]) for span in spans] == [
        ("prefill", {"iterations": 1, "tokens": 4}),
        ("decode Q0", {"iterations": 10, "tokens": 10}),
        ("decode Q1", {"iterations": 1, "tokens": 1}),
        ("queueing", {}),
        ("decode Q1", {"iterations": 1, "tokens": 1}),
    ]


def test_spans_touch_exactly_as_a_viewer_adds_them_up() -> None:
    run = Run()
    requests = [run.arrive(name, 1e4 / 7) for name in "abc"]
    now = 1e4 / 7
    for i in range(200):
        run.run(now, now := now + 0.0123456789 / (i + 1), requests[i % 3])
    for name in "abc":
        spans = run.events("requests", name)
        for before, after in itertools.pairwise(spans):
            assert before["ts"] + before["dur"] == after["ts"]
            assert int(before["ts"] * 1000) + int(before["dur"] * 1000) <= int(after["ts"] * 1000)  # In nanoseconds.
    assert sum(span["dur"] for span in run.events("engine", "iterations")) == pytest.approx((now - 1e4 / 7) * 1e6)


def test_iterations_and_stalls_share_a_thread() -> None:
    run = Run()
    a, b = run.arrive("a", 0.0), run.arrive("b", 0.0, 8)
    run.run(0.0, 0.010, a)
    run.run(0.010, 0.020, a, b)
    run.stall(0.020, 0.030, b)
    run.stall(0.030, 0.030, b)
    run.stall(0.030, 0.035)
    run.run(0.035, 0.040, a, b)
    assert run.spans("engine", "iterations") == approx(
        ("prefill", 0, 10),
        ("mixed", 10, 20),
        ("waiting for transfers", 20, 30),
        ("nothing due", 30, 35),
        ("decode", 35, 40),
    )
    mixed = run.events("engine", "iterations")[1]
    assert mixed["args"] == {"requests": 2, "scheduled tokens": 9, "prompt tokens": 8}


def test_padding_is_not_work() -> None:
    run = Run()
    a, b = run.arrive("a", 0.0), run.arrive("b", 0.0)
    run.run(0.0, 0.01, a, b)
    run.timeline.on_iteration(run, Iteration((a, b), (1, 0)), 0.01, 0.02)  # type: ignore[arg-type]
    run.leave(b, 0.01)
    assert run.spans("requests", "b") == approx(("prefill", 0, 10))
    assert run.events("engine", "iterations")[1]["args"]["requests"] == 1


def test_iterations_of_a_pipeline_take_more_threads() -> None:
    run = Run()
    a, b, c = (run.arrive(name, 0.0) for name in "abc")
    run.timeline.on_swap_wait((c,), 0.0, 0.008)
    run.run(0.0, 0.010, a)
    run.run(0.005, 0.015, b)
    run.run(0.008, 0.018, c)
    run.run(0.010, 0.020, a)
    assert run.spans("engine", "iterations") == approx(("prefill", 0, 10), ("decode", 10, 20))
    assert run.spans("engine", "iterations (2)") == approx(("prefill", 5, 15))
    assert run.spans("engine", "iterations (3)") == approx(("prefill", 8, 18))
    assert run.spans("requests", "c") == approx(("waiting for swap", 0, 8), ("prefill", 8, 18), ("queueing", 18, 20))


def test_transfers_show_whose_and_how_fast() -> None:
    run = Run()
    a = run.arrive("a", 0.0)
    run.transfer(a, Direction.OUT, 0.001, 0.002, 5_000_000)
    run.transfer(a, Direction.IN, 0.002, 0.004, 5_000_000)
    (out,), (back,) = run.events("host link", "out"), run.events("host link", "in")
    assert (out["ts"], out["dur"], out["args"]) == (1000, 1000, {"request": "a", "bytes": 5_000_000, "GB/s": 5.0})
    assert (back["ts"], back["dur"], back["args"]["GB/s"]) == (2000, 2000, 2.5)


def test_an_aborted_request_ends_where_it_left_and_an_unfinished_one_where_the_run_did() -> None:
    run = Run()
    a, b, c = run.arrive("a", 0.0), run.arrive("b", 0.0), run.arrive("c", 0.5)
    run.run(0.0, 0.010, a, b)
    run.leave(a, 0.015, RequestStatus.ABORTED)
    run.run(0.010, 0.020, a, b)  # It was in flight when it was aborted.
    assert run.spans("requests", "a") == approx(("prefill", 0, 10), ("queueing", 10, 15))
    assert run.spans("requests", "b") == approx(("prefill", 0, 10), ("decode Q0", 10, 20), ("queueing", 20, 500))
    assert run.spans("requests", "c") == []
    run.run(0.6, 0.7, c)
    run.leave(c, 0.65, RequestStatus.ABORTED)
    assert run.spans("requests", "c") == approx(("queueing", 500, 600), ("prefill", 600, 650))
    ends = [(event["name"], event["ts"]) for event in run.timeline.events() if event["ph"] == "i"]
    assert ends == [("aborted", 15_000), ("aborted", 650_000)]


def test_counters_are_written_when_they_change() -> None:
    run = Run()
    a, b = run.arrive("a", 0.0), run.arrive("b", 0.0)
    run.kv.extend(a, 8)
    run.run(0.0, 0.1, a)
    run.run(0.1, 0.2, a)
    a.level = 3
    run.kv.extend(b, 4)
    run.run(0.2, 0.3, a)
    run.leave(a, 0.3)
    run.run(0.3, 0.4, b)
    run.leave(b, 0.4)
    assert run.counter("GPU blocks") == [
        (0.0, {"used": 2, "free": 8}),
        (0.2, {"used": 3, "free": 7}),
        (0.3, {"used": 1, "free": 9}),
        (0.4, {"used": 0, "free": 10}),
    ]
    assert run.counter("host blocks") == [(0.0, {"used": 0, "free": 6})]
    assert run.counter("requests by level") == [
        (0.0, {"Q0": 2}),
        (0.2, {"Q0": 1, "Q3": 1}),
        (0.3, {"Q0": 1, "Q3": 0}),
        (0.4, {"Q0": 0, "Q3": 0}),
    ]


def test_requests_are_sorted_by_arrival_and_every_thread_has_a_name() -> None:
    run = Run()
    for name, at in (("late", 0.2), ("early", 0.1)):
        run.run(0.3, 0.4, run.arrive(name, at))
    events = list(run.timeline.events())
    order = {event["tid"]: event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"}
    threads = [event for event in events if event["name"] == "thread_name" and event["pid"] == 3]
    assert [e["args"]["name"] for e in sorted(threads, key=lambda e: order[e["tid"]])] == ["early", "late"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["engine", "host link", "requests"]
    assert len(order) == len({event["tid"] for event in events if event["ph"] == "X"})


def test_the_file_is_json_with_an_event_a_line(tmp_path: Path) -> None:
    run = Run()
    run.run(0.0, 0.1, run.arrive("a", 0.0))
    path = tmp_path / "timeline.json"
    run.timeline.write(path)
    text = path.read_text(encoding="utf-8")
    trace = json.loads(text)
    assert trace == {"displayTimeUnit": "ms", "traceEvents": list(run.timeline.events())}
    assert len(text.splitlines()) == len(trace["traceEvents"]) + 2
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot write"):
        run.timeline.write(tmp_path / "missing" / "timeline.json")


def test_a_path_is_checked_without_leaving_anything_there(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "timeline.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(OutputError, match="it is a folder"):
        check_writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        check_writable(tmp_path / "file" / "timeline.json")


def test_what_was_never_heard_of_is_no_error() -> None:
    timeline = Timeline()
    timeline.on_done(SimpleNamespace(request=SimpleNamespace(request_id="rejected")))  # type: ignore[arg-type]
    assert {event["ph"] for event in timeline.events()} == {"M"}
