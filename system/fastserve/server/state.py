"""How the engine stands at a moment, for those who watch it: /metrics and the live page."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from fastserve.engine import Engine, Job, Observer
from fastserve.server.engine_thread import EngineThread
from fastserve.server.latencies import Latencies
from fastserve.server.streams import finish_reason

_RECENT = 20
_PATIENCE_S = 1.0
"""How long the engine's thread may take to say how it stands before the last known state is shown."""


class Pool(TypedDict):
    """Blocks of a pool."""

    blocks: int
    free: int


class EngineState(TypedDict):
    """Plain data, ready for JSON."""

    now_s: float
    max_batch_size: int
    queues: list[dict[str, int]]
    running: list[dict[str, Any]]
    gpu: Pool
    host: Pool
    block_size: int
    block_bytes: int
    moving: dict[str, int]
    """GPU blocks whose contents are on their way out, and in."""


def engine_state(engine: Engine) -> EngineState:
    """To be asked for in the engine's thread, between two iterations."""
    now = engine.clock.now()
    scheduler, kv, cache = engine.scheduler, engine.kv, engine.kv.config
    running = [_running(engine.jobs[request_id], now) for request_id in scheduler.running if request_id in engine.jobs]
    return {
        "now_s": now,
        "max_batch_size": scheduler.config.num_places,
        "queues": [
            {"level": level, "fresh": fresh, "resident": resident, "away": away}
            for level, fresh, resident, away in scheduler.queue.sizes()
        ],
        "running": running,
        "gpu": {"blocks": cache.num_gpu_blocks, "free": kv.num_free_gpu_blocks},
        "host": {"blocks": cache.num_host_blocks, "free": kv.num_free_host_blocks},
        "block_size": cache.block_size,
        "block_bytes": cache.block_bytes,
        "moving": {"out": kv.num_vacating_blocks, "in": kv.num_arriving_blocks},
    }


def _running(job: Job, now: float) -> dict[str, Any]:
    request = job.request
    return {
        "id": request.request_id,
        "level": request.level,
        "prompt_tokens": request.num_prompt_tokens,
        "output_tokens": request.num_output_tokens,
        "age_s": now - request.arrival_s,
        "preemptions": job.preemptions,
    }


class RecentRequests(Observer):
    """The requests that left last, and the latencies of the last minute."""

    def __init__(self) -> None:
        self.latencies = Latencies()
        self._newest_first: deque[dict[str, Any]] = deque(maxlen=_RECENT)

    def rows(self) -> list[dict[str, Any]]:
        """The newest first, as plain data. To be asked for in the engine's thread."""
        return list(self._newest_first)

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102
        if previous_s is None:
            self.latencies.first_token(job, at_s)

    def on_done(self, job: Job) -> None:  # noqa: D102
        self.latencies.done(job)
        request = job.request
        assert job.finished_s is not None
        self._newest_first.appendleft(
            {
                "id": request.request_id,
                "status": request.status.value,
                "finish_reason": finish_reason(job),
                "prompt_tokens": request.num_prompt_tokens,
                "output_tokens": request.num_output_tokens,
                "ttft_s": None if job.first_token_s is None else job.first_token_s - request.arrival_s,
                "jct_s": job.finished_s - request.arrival_s,
                "preemptions": job.preemptions,
                "finished_s": job.finished_s,
            }
        )


class Snapshot(NamedTuple):
    """How the engine stood, what was counted until then, the requests that had left last, newest first, and the
    latencies of the last minute: all of one moment between two iterations."""

    state: EngineState
    totals: dict[str, int]
    recent: list[dict[str, Any]]
    latencies: dict[str, list[float]]


class EngineView:
    """How the engine stands, as its thread says; as it said last, if it does not answer in time."""

    def __init__(self, engine: EngineThread, totals: Mapping[str, int], recent: RecentRequests) -> None:
        """To be made before the first request, while the engine does nothing. `totals`: counters that go on."""
        self._engine = engine
        self._totals = totals
        self._recent = recent
        self._last = self._take()
        self._asked: asyncio.Future[Snapshot] | None = None
        """The question that the thread has not answered yet: a thread that hangs is asked once."""

    async def look(self) -> Snapshot:
        """At most a second old, unless the engine's thread is busy for longer."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(self._engine.call(self._take))
        answered, _ = await asyncio.wait({self._asked}, timeout=_PATIENCE_S)
        if answered:
            self._last = self._asked.result()
        return self._last

    def _take(self) -> Snapshot:
        state = engine_state(self._engine.model.engine)
        return Snapshot(state, dict(self._totals), self._recent.rows(), self._recent.latencies.copy(state["now_s"]))
