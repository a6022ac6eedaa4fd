"""The engine's state at one moment, for /metrics and the live page."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from fastserve.engine import Engine, Job, Observer
from fastserve.server.engine.streams import finish_reason
from fastserve.server.engine.thread import EngineThread
from fastserve.server.monitoring.latencies import Latencies

_MAX_RECENT = 20
_PATIENCE_S = 1.0
"""How long to wait for the engine's thread before the last known state is shown."""


class Pool(TypedDict):
    """Blocks of a cache pool."""

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
    """GPU blocks whose contents are being swapped `out` and `in`."""


def engine_state(engine: Engine) -> EngineState:
    """Return the engine's state. For the engine's thread, between two iterations."""
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
    """The requests that ended last, and the latencies of the last minute."""

    def __init__(self) -> None:
        self.latencies = Latencies()
        self._newest_first: deque[dict[str, Any]] = deque(maxlen=_MAX_RECENT)

    def rows(self) -> list[dict[str, Any]]:
        """Return the requests as plain data, the newest first. For the engine's thread."""
        return list(self._newest_first)

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102 (of Observer)
        if previous_s is None:
            self.latencies.first_token(job, at_s)

    def on_done(self, job: Job) -> None:  # noqa: D102 (of Observer)
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
    """All that is shown of the engine, of one moment between two iterations."""

    state: EngineState
    totals: dict[str, int]
    """Counters since the start."""
    recent: list[dict[str, Any]]
    """Requests that ended last, the newest first."""
    latencies: dict[str, list[float]]
    """Values of the last minute, by name."""


class StateReader:
    """Asks the engine's thread for its state; if it does not answer in time, the last known state counts."""

    def __init__(self, engine: EngineThread, totals: Mapping[str, int], recent: RecentRequests) -> None:
        """Create before the first request, while the engine is idle. `totals`: the live counters."""
        self._engine = engine
        self._totals = totals
        self._recent = recent
        self._last = self._take()
        self._asked: asyncio.Future[Snapshot] | None = None
        """The last question. A thread that has not answered it is not asked again."""

    async def read(self) -> Snapshot:
        """Return the state of now, or the last known one if the engine's thread does not answer within a second."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(self._engine.call(self._take))
        answered, _ = await asyncio.wait({self._asked}, timeout=_PATIENCE_S)
        if answered:
            self._last = self._asked.result()
        return self._last

    def _take(self) -> Snapshot:
        state = engine_state(self._engine.model.engine)
        return Snapshot(state, dict(self._totals), self._recent.rows(), self._recent.latencies.copy(state["now_s"]))
