"""Lookahead: compute a run of identical iterations at once, where the executor can predict when they end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastserve.core.clock import Clock
from fastserve.engine.executor import Executor
from fastserve.engine.iteration_log import IterationLog
from fastserve.engine.job import Job
from fastserve.kvcache import KVCacheManager
from fastserve.scheduler import Iteration, Scheduler

_MIN_ITERATIONS = 3
"""Shorter jumps cost more than they save."""
_MAX_ITERATIONS = 1024


class Lookahead:
    """Jumps over iterations in which the same requests decode and nothing else happens.

    No request arrives, finishes or changes its place in the queue, no cache moves, and there are enough blocks.
    Request, job and clock end up as after single steps, to the bit; only the numbers of the blocks differ.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        kv: KVCacheManager,
        clock: Clock,
        jobs: Mapping[str, Job],
    ) -> None:
        """`jobs` are the engine's unfinished requests by id; the engine keeps changing them."""
        self._scheduler = scheduler
        self._executor = executor
        self._kv = kv
        self._clock = clock
        self._jobs = jobs

    def jump(self, iteration: Iteration, until: float, log: IterationLog, stalled_s: float) -> bool:
        """Carry out this iteration and the identical ones that follow, and log them; False if they are too few.

        Call it while nothing is in flight. `iteration` was just decided and not submitted; `until` is the next arrival
        (seconds on the engine's clock); `log` ends with the iteration before, if it is not empty; `stalled_s` is the
        time stalled since then.
        """
        requests = iteration.requests
        batch = len(requests)
        if (
            not batch
            or sum(iteration.num_scheduled_tokens) != batch
            or iteration.preempted
            or iteration.stalled
            or iteration.swap_out
            or iteration.swap_in
            or iteration.dropped
            or iteration.reused
            or not len(log)
            or len(self._scheduler.running) != batch
        ):
            return False
        now = self._clock.now()
        # Cheap estimate: do enough iterations of the last one's length fit?
        if min(until, self._scheduler.steady_until(now)) - now < _MIN_ITERATIONS * log.last_duration_s:
            return False
        jobs = [self._jobs[request.request_id] for request in requests]
        # No request may finish in any of the iterations.
        count = min(job.max_tokens - request.num_tokens for job, request in zip(jobs, requests, strict=True)) - 1
        if count < _MIN_ITERATIONS or any(
            job.stop_token_ids or job.last_token_s is None or not request.is_decoding
            for job, request in zip(jobs, requests, strict=True)
        ):
            return False
        ends = self._executor.predict_ends(iteration, min(count, _MAX_ITERATIONS), until)
        if ends is None or len(ends) < _MIN_ITERATIONS:
            return False
        free_blocks = self._free_blocks(iteration, len(ends))
        count = int(np.searchsorted(-free_blocks, 0, side="right"))  # The number of free blocks never rises.
        times = np.concatenate(([now], ends[:count]))
        count = self._scheduler.repeats(times, free_blocks[:count])
        if count < _MIN_ITERATIONS:
            return False
        times = times[: count + 1]
        log.add_alike(
            times.tolist(),
            batch,
            len(self._jobs) - batch,
            free_blocks[:count].tolist(),
            self._kv.num_free_host_blocks,
            stalled_s,
        )
        self._executor.jumped(iteration, times)
        self._advance(iteration, jobs, times)
        return True

    def _free_blocks(self, iteration: Iteration, count: int) -> np.ndarray:
        """Free blocks on the GPU once each of `count` iterations is decided: [count]; negative if they run out."""
        kv = self._kv
        tokens = np.array([request.num_tokens for request in iteration.requests])
        held = np.array([request.cache_capacity // kv.block_size for request in iteration.requests])
        blocks = np.maximum(-(-(tokens[:, None] + np.arange(count)) // kv.block_size), held[:, None])
        free: np.ndarray = kv.num_free_gpu_blocks - (blocks - blocks[:, :1]).sum(axis=0)
        return free

    def _advance(self, iteration: Iteration, jobs: list[Job], times: np.ndarray) -> None:
        """Bring requests, jobs, scheduler and clock to the end of the iterations between consecutive `times`."""
        count = len(times) - 1
        durations = np.diff(times)
        execution = np.empty((len(jobs), count + 1))
        execution[:, 0] = [job.execution_s for job in jobs]
        execution[:, 1:] = durations
        # Added in the order of single steps, so that rounding is the same.
        totals = np.add.accumulate(execution, axis=1)[:, -1].tolist()
        first_end, end = float(times[1]), float(times[-1])
        longest = float(durations[1:].max())
        for request, job, total in zip(iteration.requests, jobs, totals, strict=True):
            assert job.last_token_s is not None
            job.execution_s = total
            job.max_token_gap_s = max(job.max_token_gap_s, first_end - job.last_token_s, longest)
            job.last_token_s = end
            request.num_computed_tokens += count
            request.num_tokens += count
            # The last iteration writes the token before the one that it generates.
            self._kv.extend(request, request.num_computed_tokens)
            if request.token_ids:
                request.token_ids.extend([0] * count)
        self._scheduler.update_repeated(iteration, times)
        self._clock.sleep_until(end)
