"""The engine loop: arrivals, schedule, execute, record. The same for every policy and every executor."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fastserve.core.clock import Clock
from fastserve.core.errors import failure_reason
from fastserve.core.logprobs import Scores
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine.executor import Executor, FinishedTransfer
from fastserve.engine.job import Job
from fastserve.kvcache import KVCacheManager
from fastserve.policies.own_policies import blamed
from fastserve.scheduler import Iteration, Scheduler
from fastserve.scheduler.iteration import IterationResult

NO_LOGPROBS = "logprobs and prompt_logprobs need a model, and a simulation has none; leave them out"
_FEWEST_WORTH_A_JUMP, _LONGEST_JUMP = 3, 1024


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
    """Unfinished requests in the system that were in no batch in flight when this one ended."""
    free_gpu_blocks: int
    free_host_blocks: int
    num_preempted: int
    stalled_s: float
    """Time since the previous iteration in which nothing was in flight because of transfers under way."""


class Observer:
    """Is told what happens, as it happens; overrides what it wants to hear. Times are seconds on the engine's clock."""

    def on_arrival(self, job: Job) -> None:
        """A request has entered the system."""

    def on_submit(self, iteration: Iteration) -> None:
        """A decision is carried out from now on; one without requests may still move or drop caches."""

    def on_iteration(self, engine: Engine, iteration: Iteration, start_s: float, end_s: float) -> None:
        """An iteration has ended and its requests have not advanced yet."""

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        """A request has a new token; `previous_s` is when it got the one before, None for its first.

        If it was the last, the status is FINISHED already; it leaves, with `on_done`, when its policy lets it.
        """

    def on_stall(self, engine: Engine, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """No iteration was started, and these requests, if any, were due and waited for a transfer. If there are none,
        nothing was in flight either."""

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """From one decision to the next, whether anything ran or not, these were due and waited for a transfer."""

    def on_transfer(self, finished: FinishedTransfer) -> None:
        """A transfer has ended."""

    def on_done(self, job: Job) -> None:
        """A request has left the system."""


class Observers(Observer):
    """Several observers as one, told in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_arrival(self, job: Job) -> None:  # noqa: D102 (as in Observer)
        for observer in self._observers:
            observer.on_arrival(job)

    def on_submit(self, iteration: Iteration) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_submit(iteration)

    def on_iteration(self, engine: Engine, iteration: Iteration, start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_iteration(engine, iteration, start_s, end_s)

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_token(job, token, at_s, previous_s)

    def on_stall(self, engine: Engine, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_stall(engine, stalled, start_s, end_s)

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_swap_wait(stalled, start_s, end_s)

    def on_transfer(self, finished: FinishedTransfer) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_transfer(finished)

    def on_done(self, job: Job) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_done(job)


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
        self.last_run: list[Job] = []
        """What `run` returned, or would have returned, had not an error ended it."""
        self.error: BaseException | None = None
        """What ended the engine: it takes no more requests."""
        self.observer: Observer | None = None
        self.jumps = True
        """Whether iterations that can only be alike are computed at once where the executor can tell their times."""
        if scheduler.needs_oracle:
            scheduler.oracle = self._tokens_to_come
        self._in_flight: deque[Iteration] = deque()
        self._num_jobs_in_flight = 0
        self._stalled: tuple[Request, ...] = ()
        """Those that the last decision kept back for a transfer."""
        self._stalled_since = 0.0
        self._stalled_s = 0.0

    # -- requests in and out -------------------------------------------------------------------------------------

    def add_request(self, request: Request, params: SamplingParams) -> Job:
        """Take a request into the system.

        One that could never be served is marked REJECTED, with the reason in `job.error`, and not taken.
        Raises what ended the engine, if something has.
        """
        if self.error is not None:
            raise self.error
        job = Job(request, params, self.eos_token_ids)
        job.error = self.why_never(request.request_id, request.num_prompt_tokens, params.max_tokens)
        if params.asks_logprobs and not self.executor.has_logits:
            job.error = f"request {request.request_id}: {NO_LOGPROBS}"
        if job.error:
            request.status = RequestStatus.REJECTED
            return job
        if not request.max_output_tokens:
            limit = self.max_model_len or self.kv.config.num_gpu_blocks * self.kv.block_size
            request.max_output_tokens = limit - request.num_prompt_tokens
        self.jobs[request.request_id] = job
        self.executor.add_request(request, params, self.eos_token_ids)
        try:
            self.scheduler.add(request)
        except Exception as error:
            raise blamed(error, type(self.scheduler)) from error.__cause__
        if self.observer:
            self.observer.on_arrival(job)
        return job

    def abort(self, request_id: str) -> bool:
        """End an unfinished request and free what it holds; False if there is none of that id."""
        job = self.jobs.get(request_id)
        if job is None:
            return False
        now = self.clock.now()
        self._charge_stall(now)
        del self.jobs[request_id]
        job.request.status = RequestStatus.ABORTED
        job.finished_s = now
        # The blocks of one in flight are still being written; it leaves when its iteration is collected.
        if job.request.in_flight:
            self._num_jobs_in_flight -= 1
        else:
            self.scheduler.abort(request_id)
            self.executor.remove_request(job.request)
        if self.observer:
            self.observer.on_done(job)
        return True

    def why_never(self, name: str, num_prompt_tokens: int, max_tokens: int) -> str:
        """Why no schedule could ever serve request `name` of that prompt and output; empty if one can.

        Rests on nothing that changes: any thread may ask.
        """
        total = num_prompt_tokens + max_tokens
        sizes = f"request {name}: prompt of {num_prompt_tokens} tokens + output of up to {max_tokens}"
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

    @property
    def longest_request(self) -> int:
        """Prompt and output tokens of the longest request that `why_never` has nothing against."""
        room = self.kv.config.num_gpu_blocks * self.kv.block_size + 1
        return room if self.max_model_len is None else min(room, self.max_model_len)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is in the system."""
        return bool(self.jobs) or bool(self._in_flight)

    def run(self, arrivals: Iterable[Arrival], on_done: Callable[[Job], None] | None = None) -> list[Job]:
        """Serve requests that arrive at known times, in that order; returns their jobs when all are done.

        `on_done` is called as each job leaves the system. Raises what `step` raises; `last_run` has the jobs then. A
        KeyboardInterrupt ends the engine too: unfinished jobs are ABORTED, and `last_run` has those to come as well.
        """
        pending = deque(sorted(arrivals, key=lambda arrival: arrival.request.arrival_s))
        self.last_run = []
        try:
            self._run(pending, on_done)
        except KeyboardInterrupt as stop:
            self._end_all(stop, RequestStatus.ABORTED, "the run was interrupted")
            for arrival in pending:
                job = Job(arrival.request, arrival.params, self.eos_token_ids)
                job.request.status, job.error = RequestStatus.ABORTED, "the run was interrupted before it arrived"
                self.last_run.append(job)
            raise
        return self.last_run

    def _run(self, pending: deque[Arrival], on_done: Callable[[Job], None] | None) -> None:
        jobs = self.last_run
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

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self, until: float = math.inf) -> list[Job]:
        """One turn: collect the oldest iteration if it has ended; else, if the first stage is free, decide on the next.

        With the pipeline full after that, collects the oldest iteration; otherwise waits until something ends: the work
        of the first stage, an iteration or a transfer, at the longest until `until` (seconds on the engine's clock, the
        next arrival). Returns the jobs that finished.

        Raises RankError if what executes has failed. That, or any other error, ends the engine, and every request in
        the system is FAILED, with the reason in `job.error`.
        """
        try:
            return self._turn(until)
        except Exception as error:
            cause = blamed(error, type(self.scheduler))
            self._end_all(cause, RequestStatus.FAILED, failure_reason(cause))
            raise cause from error.__cause__

    def _turn(self, until: float) -> list[Job]:
        self._complete_transfers()
        executor, in_flight = self.executor, self._in_flight
        if in_flight:
            if executor.can_collect:
                return self._postprocess(in_flight.popleft(), executor.collect())
            if not executor.can_submit or self._num_jobs_in_flight == len(self.jobs):
                executor.wait(until)
                return []
        iteration = self._decide()
        if self.jumps and self._jump(iteration, until):
            return []
        self._submit(iteration)
        if len(in_flight) >= executor.max_in_flight:
            return self._postprocess(in_flight.popleft(), executor.collect())
        if iteration.requests:
            executor.wait(until)
        else:
            self._wait(iteration.stalled, until)
        return []

    def _decide(self) -> Iteration:
        now = self.clock.now()
        if self._stalled:
            self._charge_stall(now)
        iteration = self.scheduler.schedule(now)
        self._stalled, self._stalled_since = iteration.stalled, now
        return iteration

    def _submit(self, iteration: Iteration) -> None:
        jobs = self.jobs
        self.executor.submit(iteration)
        if self.observer:
            self.observer.on_submit(iteration)
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
            self._num_jobs_in_flight += len(iteration.requests)

    def _wait(self, stalled: tuple[Request, ...], until: float) -> None:
        if not self._in_flight and not self.executor.num_transfers_in_flight and math.isinf(until):
            raise RuntimeError(
                f"policy {self.scheduler.name!r} schedules nothing although {len(self.jobs)} requests wait, "
                "nothing is in flight and none will arrive: a bug in the policy"
            )
        start = self.clock.now()
        self.executor.wait(until)
        end = self.clock.now()
        if not self._in_flight:
            self._stalled_s += end - start
        if self.observer and (stalled or not self._in_flight):
            self.observer.on_stall(self, stalled, start, end)

    def _charge_stall(self, now: float) -> None:
        """Those whom the last decision kept back for a transfer have waited for it until now."""
        for request in self._stalled:
            job = self.jobs.get(request.request_id)
            if job is not None:  # Not aborted meanwhile.
                job.swapping_s += now - self._stalled_since
        if self.observer:
            self.observer.on_swap_wait(self._stalled, self._stalled_since, now)
        self._stalled_since = now

    def _postprocess(self, iteration: Iteration, result: IterationResult) -> list[Job]:
        """Advance every request of the iteration, let the scheduler decide who leaves, and record."""
        start, end = result.start_s, result.end_s
        duration = end - start
        jobs = self.jobs
        num_advanced = len(iteration.requests)
        observer = self.observer
        if observer:
            observer.on_iteration(self, iteration, start, end)
        if result.scores:
            self._take_scores(iteration, result.scores)
        for request, num_scheduled, token in zip(
            iteration.requests, iteration.num_scheduled_tokens, result.tokens, strict=True
        ):
            request.in_flight = False
            job = jobs.get(request.request_id)
            if job is None:  # Aborted in flight.
                num_advanced -= 1
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
            elif request.num_computed_tokens < request.num_tokens or not num_scheduled:
                continue
            elif end - last_token_s > job.max_token_gap_s:
                job.max_token_gap_s = end - last_token_s
            job.last_token_s = end
            request.num_tokens += 1
            if request.token_ids:
                request.token_ids.append(token)
            if request.num_tokens >= job.max_tokens or (
                token in job.stop_token_ids and request.num_tokens >= job.min_tokens
            ):
                request.status = RequestStatus.FINISHED
            if observer:
                observer.on_token(job, token, end, last_token_s)
        num_waiting = len(jobs) - self._num_jobs_in_flight
        self._num_jobs_in_flight -= num_advanced
        finished: list[Job] = []
        for request in self.scheduler.update(iteration, result):
            job = jobs.pop(request.request_id, None)
            if job is not None:
                job.finished_s = end
                finished.append(job)
                self.executor.remove_request(request)
                if observer:
                    observer.on_done(job)
        self.iterations.append(
            IterationRecord(
                start,
                end,
                len(iteration.requests),
                sum(iteration.num_scheduled_tokens),
                num_waiting,
                self.kv.num_free_gpu_blocks,
                self.kv.num_free_host_blocks,
                len(iteration.preempted),
                self._stalled_s,
            )
        )
        self._stalled_s = 0.0
        return finished

    def _take_scores(self, iteration: Iteration, scores: Mapping[int, Scores]) -> None:
        for place, one in scores.items():
            job = self.jobs.get(iteration.requests[place].request_id)
            if job is not None and job.logprobs is not None:
                job.logprobs.add(one)

    def _jump(self, iteration: Iteration, until: float) -> bool:
        """Carry out this iteration and all after it that can only be like it at once, if there are any.

        What is recorded is what one step after the other records, to the bit; only the numbers of the blocks differ.
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
            or self.observer
            or self._in_flight
            or len(self.scheduler.running) != batch
        ):
            return False
        last = self.iterations[-1] if self.iterations else None
        now = self.clock.now()
        # If the iterations to come last as long as the last one, are there enough of them?
        if last is None or min(until, self.scheduler.steady_until(now)) - now < _FEWEST_WORTH_A_JUMP * (
            last.end_s - last.start_s
        ):
            return False
        jobs = [self.jobs[request.request_id] for request in requests]
        # In none of them may a request finish.
        count = min(job.max_tokens - request.num_tokens for job, request in zip(jobs, requests, strict=True)) - 1
        if count < _FEWEST_WORTH_A_JUMP or any(
            job.stop_token_ids or job.last_token_s is None or not request.is_decoding
            for job, request in zip(jobs, requests, strict=True)
        ):
            return False
        ends = self.executor.foresee(iteration, min(count, _LONGEST_JUMP), until)
        if ends is None or len(ends) < _FEWEST_WORTH_A_JUMP:
            return False
        kv = self.kv
        tokens = np.array([request.num_tokens for request in requests])
        held = np.array([request.cache_capacity // kv.block_size for request in requests])
        blocks = np.maximum(-(-(tokens[:, None] + np.arange(len(ends))) // kv.block_size), held[:, None])
        free_blocks = kv.num_free_gpu_blocks - (blocks - blocks[:, :1]).sum(axis=0)
        count = int(np.searchsorted(-free_blocks, 0, side="right"))  # Free blocks never rise.
        times = np.concatenate(([now], ends[:count]))
        count = self.scheduler.repeats(times, free_blocks[:count])
        if count < _FEWEST_WORTH_A_JUMP:
            return False
        times = times[: count + 1]
        self._advance(iteration, jobs, times)
        self._record_alike(iteration, times, free_blocks[:count])
        return True

    def _advance(self, iteration: Iteration, jobs: list[Job], times: np.ndarray) -> None:
        """Iterations alike have passed, from each of `times` to the next; nobody finished."""
        count = len(times) - 1
        durations = np.diff(times)
        execution = np.empty((len(jobs), count + 1))
        execution[:, 0] = [job.execution_s for job in jobs]
        execution[:, 1:] = durations
        # Added up one by one, as steps would.
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
            # As far as the last of them needed.
            self.kv.extend(request, request.num_computed_tokens)
            if request.token_ids:
                request.token_ids.extend([0] * count)
        self.scheduler.update_repeated(iteration, times)
        self.clock.sleep_until(end)

    def _record_alike(self, iteration: Iteration, times: np.ndarray, free_blocks: np.ndarray) -> None:
        batch = len(iteration.requests)
        num_waiting = len(self.jobs) - batch
        free_host = self.kv.num_free_host_blocks
        stalled_s = self._stalled_s
        for (start, end), free in zip(itertools.pairwise(times.tolist()), free_blocks.tolist(), strict=True):
            self.iterations.append(
                IterationRecord(start, end, batch, batch, num_waiting, free, free_host, 0, stalled_s)
            )
            stalled_s = 0.0
        self._stalled_s = 0.0

    def _end_all(self, error: BaseException, status: RequestStatus, reason: str) -> None:
        """End the engine, and every request in it with this status."""
        self.error = error
        now = self.clock.now()
        for job in self.jobs.values():
            job.request.status, job.error = status, reason
            job.finished_s = now
            if self.observer:
                self.observer.on_done(job)
        self.jobs.clear()
        self._in_flight.clear()
        self._num_jobs_in_flight = 0

    def _complete_transfers(self) -> None:
        if self.executor.num_transfers_in_flight:
            for finished in self.executor.finished_transfers():
                self.scheduler.complete(finished.transfer, finished.end_s - finished.start_s)
                if self.observer:
                    self.observer.on_transfer(finished)

    def _tokens_to_come(self, request: Request) -> int:
        return self.jobs[request.request_id].max_tokens - request.num_tokens
