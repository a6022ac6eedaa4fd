"""The engine loop: arrivals, schedule, execute, record. The same for every policy and every executor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastserve.clock import Clock
from fastserve.executor.base import Executor, IterationResult
from fastserve.job import Job
from fastserve.kvcache import KVCacheManager
from fastserve.request import Request, RequestStatus, SamplingParams
from fastserve.scheduler import Iteration, Scheduler


class Arrival(NamedTuple):
    """A request that arrives at `request.arrival_s`."""

    request: Request
    params: SamplingParams


class IterationRecord(NamedTuple):
    """The row of iterations.parquet: one computed iteration."""

    start_s: float
    end_s: float
    num_requests: int
    num_scheduled_tokens: int
    num_waiting: int
    """Unfinished requests in the system that were not in the batch."""
    free_gpu_blocks: int
    free_host_blocks: int
    num_preempted: int
    stalled_s: float
    """Time since the previous iteration in which the chosen batch waited for transfers."""


class Engine:
    """Runs requests under one scheduler on one executor, and records what happened.

    Single-threaded: `add_request`, `abort` and `step` are called from one thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        kv: KVCacheManager,
        clock: Clock,
        *,
        max_model_len: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.kv = kv
        self.clock = clock
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.jobs: dict[str, Job] = {}
        """Unfinished requests by id."""
        self.iterations: list[IterationRecord] = []
        self._in_flight: deque[Iteration] = deque()
        self._stalled_s = 0.0

    # -- requests in and out -------------------------------------------------------------------------------------

    def add_request(self, request: Request, params: SamplingParams) -> Job:
        """Take a request into the system.

        One that could never be served is marked REJECTED, with the reason in `job.error`, and not taken.
        """
        job = Job(request, params, self.eos_token_ids)
        job.error = self._why_never(request, params)
        if job.error:
            request.status = RequestStatus.REJECTED
            return job
        if not request.max_output_tokens:
            limit = self.max_model_len or self.kv.config.num_gpu_blocks * self.kv.block_size
            request.max_output_tokens = limit - request.num_prompt_tokens
        self.jobs[request.request_id] = job
        self.executor.add_request(request, params)
        self.scheduler.add(request)
        return job

    def abort(self, request_id: str) -> bool:
        """End an unfinished request and free what it holds; False if there is none of that id."""
        job = self.jobs.pop(request_id, None)
        if job is None:
            return False
        job.request.status = RequestStatus.ABORTED
        job.finished_s = self.clock.now()
        # The blocks of one in flight are still being written; it leaves when its iteration is collected.
        if not job.request.in_flight:
            self.scheduler.abort(request_id)
            self.executor.remove_request(job.request)
        return True

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is in the system."""
        return bool(self.jobs) or bool(self._in_flight)

    def run(self, arrivals: Iterable[Arrival], on_done: Callable[[Job], None] | None = None) -> list[Job]:
        """Serve requests that arrive at known times, in that order; returns their jobs when all are done.

        `on_done` is called as each job leaves the system.
        """
        pending = deque(sorted(arrivals, key=lambda arrival: arrival.request.arrival_s))
        jobs: list[Job] = []
        while pending or self.has_unfinished:
            now = self.clock.now()
            while pending and pending[0].request.arrival_s <= now:
                job = self.add_request(*pending.popleft())
                jobs.append(job)
                if job.is_done and on_done:
                    on_done(job)
            next_arrival = pending[0].request.arrival_s if pending else math.inf
            if self.has_unfinished:
                finished = self.step(next_arrival)
                if on_done:
                    for job in finished:
                        on_done(job)
            elif pending:
                self.clock.sleep_until(next_arrival)
        while self.executor.num_transfers_in_flight:
            self.executor.wait(math.inf)
            self._complete_transfers()
        return jobs

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self, until: float = math.inf) -> list[Job]:
        """One turn: schedule and submit while the executor takes more, then collect one iteration.

        If nothing can run, waits for a transfer to end, at the longest to `until` (seconds on the engine's clock, the
        next arrival). Returns the jobs that finished.
        """
        self._complete_transfers()
        stalled: tuple[Request, ...] = ()
        while len(self._in_flight) < self.executor.max_in_flight:
            iteration = self.scheduler.schedule(self.clock.now())
            self._submit(iteration)
            if not iteration.requests:
                stalled = iteration.stalled
                break
        if self._in_flight:
            return self._postprocess(self._in_flight.popleft(), self.executor.collect())
        self._wait(stalled, until)
        return []

    def _submit(self, iteration: Iteration) -> None:
        jobs = self.jobs
        self.executor.submit(iteration)
        for request in iteration.requests:
            request.in_flight = True
        for request in iteration.preempted:
            jobs[request.request_id].preemptions += 1
        for drop in iteration.dropped:
            jobs[drop.request.request_id].recomputed_tokens += drop.num_lost_tokens
        for transfer in iteration.swap_out:
            jobs[transfer.request.request_id].swap_out_bytes += transfer.num_bytes
        for transfer in iteration.swap_in:
            jobs[transfer.request.request_id].swap_in_bytes += transfer.num_bytes
        if iteration.requests:
            self._in_flight.append(iteration)

    def _wait(self, stalled: tuple[Request, ...], until: float) -> None:
        if not self.executor.num_transfers_in_flight and math.isinf(until):
            raise RuntimeError(
                f"policy {self.scheduler.name!r} schedules nothing although {len(self.jobs)} requests wait, "
                "nothing is in flight and none will arrive: a bug in the policy"
            )
        start = self.clock.now()
        self.executor.wait(until)
        waited = self.clock.now() - start
        self._stalled_s += waited
        for request in stalled:
            self.jobs[request.request_id].swapping_s += waited

    def _postprocess(self, iteration: Iteration, result: IterationResult) -> list[Job]:
        """Advance every request of the iteration, end those that are done, and tell the scheduler."""
        start, end = result.start_s, result.end_s
        duration = end - start
        jobs = self.jobs
        finished: list[Job] = []
        for request, num_scheduled, token in zip(
            iteration.requests, iteration.num_scheduled_tokens, result.tokens, strict=True
        ):
            request.in_flight = False
            job = jobs.get(request.request_id)
            if job is None:  # Aborted in flight.
                self.executor.remove_request(request)
                continue
            request.num_computed_tokens += num_scheduled
            job.execution_s += duration
            last_token_s = job.last_token_s
            if last_token_s is None:
                if job.first_scheduled_s is None:
                    job.first_scheduled_s = start
                if request.num_computed_tokens < request.num_tokens:
                    continue
                job.first_token_s = end
            elif request.num_computed_tokens < request.num_tokens:
                continue
            elif end - last_token_s > job.max_token_gap_s:
                job.max_token_gap_s = end - last_token_s
            job.last_token_s = end
            request.num_tokens += 1
            if request.token_ids:
                request.token_ids.append(token)
            if request.num_tokens >= job.max_tokens or token in job.stop_token_ids:
                job.finished_s = end
                request.status = RequestStatus.FINISHED
                finished.append(job)
        self.scheduler.update(iteration, result)
        for job in finished:
            del jobs[job.request.request_id]
            self.executor.remove_request(job.request)
        self.iterations.append(
            IterationRecord(
                start,
                end,
                len(iteration.requests),
                sum(iteration.num_scheduled_tokens),
                len(jobs) + len(finished) - len(iteration.requests),
                self.kv.num_free_gpu_blocks,
                self.kv.num_free_host_blocks,
                len(iteration.preempted),
                self._stalled_s,
            )
        )
        self._stalled_s = 0.0
        return finished

    def _complete_transfers(self) -> None:
        if self.executor.num_transfers_in_flight:
            for transfer in self.executor.finished_transfers():
                self.kv.complete(transfer)

    def _why_never(self, request: Request, params: SamplingParams) -> str:
        """Why no schedule could ever serve the request; empty if one can."""
        total = request.num_prompt_tokens + params.max_tokens
        sizes = (
            f"request {request.request_id}: prompt of {request.num_prompt_tokens} tokens "
            f"+ output of up to {params.max_tokens}"
        )
        if self.max_model_len is not None and total > self.max_model_len:
            return f"{sizes} exceeds the model's context of {self.max_model_len} tokens"
        # The last token generated is never fed back, so it needs no room.
        needed, blocks = self.kv.blocks_for(total - 1), self.kv.config.num_gpu_blocks
        if needed > blocks:
            return (
                f"{sizes} needs {needed} cache blocks of {self.kv.block_size} tokens, the GPU pool has {blocks}; "
                "raise num_gpu_blocks or shorten the request"
            )
        return ""
