"""Timeline: record what requests, engine and host link do during a run, as a trace for Perfetto."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.files import atomic_write
from fastserve.core.request import Request
from fastserve.engine.executor import FinishedTransfer
from fastserve.engine.job import Job
from fastserve.engine.observer import EngineView, Observer
from fastserve.kvcache import Direction
from fastserve.scheduler.iteration import Iteration

Event = dict[str, Any]
"""One entry of `traceEvents`."""

_ENGINE, _HOST_LINK, _REQUESTS = 1, 2, 3
_FIRST_THREAD = 10
"""Thread numbers start above the process numbers: viewers put a thread with its process's number first."""
_WAITING = "waiting for swap"
_TOUCH_S = 1e-9
"""Times that differ by less are equal but for rounding."""


@dataclass(slots=True)
class _Span:
    """A named interval of time."""

    name: str
    start_s: float
    end_s: float
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Life:
    """A request since its arrival: when it ran or waited for a transfer, in order. The time between is queueing."""

    job: Job
    spans: list[_Span] = field(default_factory=list)

    def ran(self, name: str, num_tokens: int, start_s: float, end_s: float) -> None:
        """Add an iteration that the request was part of."""
        args = self._lengthen(name, start_s, end_s).args
        args["iterations"] = args.get("iterations", 0) + 1
        args["tokens"] = args.get("tokens", 0) + num_tokens

    def waited(self, start_s: float, end_s: float) -> None:
        """Add time in which the request was due and waited for a transfer."""
        if end_s > self._since(start_s):
            self._lengthen(_WAITING, start_s, end_s)

    def tiles(self, end_s: float) -> Iterator[_Span]:
        """Spans that cover the time from arrival to `end_s` without gap or overlap."""
        now = self.job.request.arrival_s
        for span in (*self.spans, _Span("", end_s, end_s)):
            start, end = min(span.start_s, end_s), min(span.end_s, end_s)
            if start > now:
                yield _Span("queueing", now, start)
            if end > start:
                yield _Span(span.name, start, end, span.args)
            now = end

    def _lengthen(self, name: str, start_s: float, end_s: float) -> _Span:
        """Extend the last span to `end_s` if it has that name and ends at `start_s`; otherwise add a span."""
        start_s = self._since(start_s)
        if not self.spans or self.spans[-1].name != name or start_s - self.spans[-1].end_s > _TOUCH_S:
            self.spans.append(_Span(name, start_s, end_s))
        self.spans[-1].end_s = end_s
        return self.spans[-1]

    def _since(self, start_s: float) -> float:
        """`start_s`, or the end of the last span if that is later."""
        return max(start_s, self.spans[-1].end_s if self.spans else self.job.request.arrival_s)


class Timeline(Observer):
    """Observes an engine (`engine.observer = Timeline()`) and writes the run as a Chrome trace.

    The trace has three processes. The engine has a thread of iterations and waits. The host link has a thread for each
    direction. Every request is a thread, from its arrival to its end: queueing, waiting for transfers, running.
    """

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}
        """Requests in the system, by id."""
        self._left: list[_Life] = []
        """Requests that have left."""
        self._iterations: list[_Span] = []
        self._transfers: dict[Direction, list[_Span]] = {direction: [] for direction in Direction}
        self._counters: list[Event] = []
        self._counted: dict[str, dict[str, int]] = {}
        """Last values of each counter."""
        self._engine: EngineView | None = None
        self._end_s = 0.0
        """The latest time recorded."""

    # -- events of the engine ------------------------------------------------------------------------------------

    def on_arrival(self, job: Job) -> None:
        """A request has entered the system."""
        self._lives[job.request.request_id] = _Life(job)
        self._end_s = max(self._end_s, job.request.arrival_s)

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """An iteration has ended; its requests have not advanced yet."""
        num_prompt_tokens = num_tokens = num_rows = 0
        for request, num_scheduled in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if not num_scheduled:  # Padding.
                continue
            num_rows += 1
            num_tokens += num_scheduled
            if not request.is_decoding:
                num_prompt_tokens += num_scheduled
            if life := self._lives.get(request.request_id):  # None if aborted in flight.
                name = f"decode Q{request.level}" if request.is_decoding else "prefill"
                life.ran(name, num_scheduled, start_s, end_s)
        kind = "decode" if not num_prompt_tokens else "prefill" if num_prompt_tokens == num_tokens else "mixed"
        args = {"requests": num_rows, "scheduled tokens": num_tokens, "prompt tokens": num_prompt_tokens}
        self._iterations.append(_Span(kind, start_s, end_s, args))
        self._end_s = max(self._end_s, end_s)
        self._count(engine, start_s)

    def on_stall(self, engine: EngineView, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """No iteration was started."""
        if end_s > start_s:
            name = "waiting for transfers" if stalled else "nothing due"
            self._iterations.append(_Span(name, start_s, end_s, {"requests": len(stalled)}))
            self._end_s = max(self._end_s, end_s)
            self._count(engine, start_s)

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """These requests were due and waited for a transfer."""
        for request in stalled:
            if life := self._lives.get(request.request_id):
                life.waited(start_s, end_s)

    def on_transfer(self, finished: FinishedTransfer) -> None:
        """A transfer has ended."""
        transfer, start_s, end_s = finished.transfer, finished.start_s, finished.end_s
        request_id, num_bytes = transfer.request.request_id, transfer.num_bytes
        args: dict[str, Any] = {"request": request_id, "bytes": num_bytes}
        if end_s > start_s:
            args["GB/s"] = round(num_bytes / (end_s - start_s) / 1e9, 3)
        self._transfers[transfer.direction].append(_Span(f"request {request_id}", start_s, end_s, args))
        self._end_s = max(self._end_s, end_s)

    def on_done(self, job: Job) -> None:
        """A request has left the system."""
        if life := self._lives.pop(job.request.request_id, None):
            self._left.append(life)
            if self._engine and not self._lives and job.finished_s is not None:
                self._count(self._engine, job.finished_s)  # The system is empty: count it, since no iteration will.

    # -- the trace -----------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write the trace, one event a line; OutputError if the file cannot be written."""
        with atomic_write(path) as staging, staging.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            for i, event in enumerate(self.events()):
                file.write((",\n" if i else "") + json.dumps(event, separators=(",", ":"), allow_nan=False))
            file.write("\n]}\n")

    def events(self) -> Iterator[Event]:
        """Every event of the trace. A request still in the system ends at the latest time recorded."""
        for pid, process in ((_ENGINE, "engine"), (_HOST_LINK, "host link"), (_REQUESTS, "requests")):
            yield _metadata("process", pid, 0, name=process)
            yield _metadata("process", pid, 0, sort_index=pid)
        threads = [(_ENGINE, *lane) for lane in _lanes("iterations", self._iterations)]
        for direction, spans in self._transfers.items():
            threads += [(_HOST_LINK, *lane) for lane in _lanes(direction.value, spans)]
        for tid, (pid, thread, lane) in enumerate(threads, _FIRST_THREAD):
            yield from _thread(pid, tid, thread, lane)
        lives = sorted((*self._left, *self._lives.values()), key=lambda life: life.job.request.arrival_s)
        for tid, life in enumerate(lives, _FIRST_THREAD + len(threads)):
            request, finished_s = life.job.request, life.job.finished_s
            tiles = life.tiles(self._end_s if finished_s is None else finished_s)
            yield from _thread(_REQUESTS, tid, request.request_id, tiles)
            if finished_s is not None:
                yield {"name": request.status.value, "ph": "i", "s": "t", "pid": _REQUESTS, "tid": tid,
                       "ts": _microseconds(finished_s)}  # fmt: skip
        yield from self._counters

    # -- helpers -------------------------------------------------------------------------------------------------

    def _count(self, engine: EngineView, now: float) -> None:
        self._engine, kv = engine, engine.kv
        for name, total, free in (
            ("GPU blocks", kv.config.num_gpu_blocks, kv.num_free_gpu_blocks),
            ("host blocks", kv.config.num_host_blocks, kv.num_free_host_blocks),
        ):
            self._counter(name, now, {"used": total - free, "free": free})
        levels = Counter(job.request.level for job in engine.jobs.values())
        # Report emptied levels as zero: viewers keep drawing the last value of an absent one.
        known = {int(level[1:]) for level in self._counted.get("requests by level", ())}
        self._counter("requests by level", now, {f"Q{level}": levels[level] for level in sorted(known | levels.keys())})

    def _counter(self, name: str, now: float, values: Mapping[str, int]) -> None:
        if values != self._counted.get(name):
            self._counted[name] = dict(values)
            self._counters.append(
                {"name": name, "ph": "C", "pid": _ENGINE, "ts": _microseconds(now), "args": self._counted[name]}
            )


def _lanes(thread: str, spans: Iterable[_Span]) -> list[tuple[str, list[_Span]]]:
    """Distribute spans over as few threads as possible without overlap: one, unless a pipeline overlaps them."""
    lanes: list[list[_Span]] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        for lane in lanes:
            if lane[-1].end_s <= span.start_s:
                lane.append(span)
                break
        else:
            lanes.append([span])
    return [(thread if i == 1 else f"{thread} ({i})", lane) for i, lane in enumerate(lanes, 1)]


def _thread(pid: int, tid: int, name: str, spans: Iterable[_Span]) -> Iterator[Event]:
    """Events of one thread: its name, its sort index and its spans."""
    yield _metadata("thread", pid, tid, name=name)
    yield _metadata("thread", pid, tid, sort_index=tid)
    for span in spans:
        start, end = _microseconds(span.start_s), _microseconds(span.end_s)
        yield {"name": span.name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": end - start, "args": span.args}


def _metadata(what: str, pid: int, tid: int, **value: str | int) -> Event:
    (key,) = value
    return {"name": f"{what}_{key}", "ph": "M", "pid": pid, "tid": tid, "args": value}


def _microseconds(time_s: float) -> float:
    """Microseconds, rounded to a 64th, so that floats, decimals and their sums are exact.

    Viewers compute the end of a span, and drop the next span if it starts a nanosecond before that.
    """
    return round(time_s * 64e6) / 64
