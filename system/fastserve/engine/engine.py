"""Engine: the loop that schedules, executes and records; the same for every policy and every executor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from fastserve.core.clock import Clock
from fastserve.core.compiled import mypyc_attr
from fastserve.core.errors import failure_reason
from fastserve.core.logprobs import Scores
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine.arrivals import Arrival, Arrivals
from fastserve.engine.executor import Executor
from fastserve.engine.iteration_log import IterationLog
from fastserve.engine.job import Job
from fastserve.engine.lookahead import Lookahead
from fastserve.engine.observer import Observer
from fastserve.engine.recorder import CHUNK, Recorder
from fastserve.kvcache import KVCacheManager
from fastserve.scheduler import Iteration, Scheduler
from fastserve.scheduler.blame import blamed
from fastserve.scheduler.iteration import IterationResult

NO_LOGPROBS = "logprobs and prompt_logprobs need a model, and a simulation has none; leave them out"


@mypyc_attr(allow_interpreted_subclasses=True)
class Engine:
    """Runs requests under one scheduler on one executor, and records what happened.

    Not thread-safe: call `add_request`, `abort` and `step` from one thread.
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
        self.iterations = IterationLog()
        self.last_run: list[Job] = []
        """Jobs of the last `run`, also if an error ended it."""
        self.error: BaseException | None = None
        """The error that ended the engine; it takes no more requests."""
        self.observer: Observer | None = None
        self.jumps = True
        """Whether to compute identical iterations at once where the executor can predict their ends (Lookahead)."""
        if scheduler.policy.needs_oracle:
            scheduler.policy.oracle = self._remaining_tokens
        self._in_flight: deque[Iteration] = deque()
        self._num_jobs_in_flight = 0
        self._lookahead = Lookahead(scheduler, executor, kv, clock, self.jobs)
        self._stalled: tuple[Request, ...] = ()
        """Requests that wait for a transfer since the last decision."""
        self._stalled_since = 0.0
        self._stalled_s = 0.0
        """Time since the last iteration in which nothing was in flight because of transfers."""

    # -- requests in and out -------------------------------------------------------------------------------------

    def add_request(self, request: Request, params: SamplingParams) -> Job:
        """Take a request into the system.

        A request that no schedule can serve is REJECTED, with the reason in `job.error`, and not taken.
        Raises the error that ended the engine, if one has.
        """
        if self.error is not None:
            raise self.error
        job = Job(request, params, self.eos_token_ids)
        job.error = self.rejection_reason(request.request_id, request.num_prompt_tokens, params.max_tokens)
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
            raise blamed(error, type(self.scheduler.policy)) from error.__cause__
        if self.observer:
            self.observer.on_arrival(job)
        return job

    def abort(self, request_id: str) -> bool:
        """Abort an unfinished request and free its cache; False if there is none with that id."""
        job = self.jobs.get(request_id)
        if job is None:
            return False
        now = self.clock.now()
        self._charge_stall(now)
        del self.jobs[request_id]
        job.request.status = RequestStatus.ABORTED
        job.finished_s = now
        # An iteration in flight still writes its blocks: the request leaves when that is collected.
        if job.request.in_flight:
            self._num_jobs_in_flight -= 1
        else:
            self.scheduler.abort(request_id)
            self.executor.remove_request(job.request)
        if self.observer:
            self.observer.on_done(job)
        return True

    def rejection_reason(self, name: str, num_prompt_tokens: int, max_tokens: int) -> str:
        """Why no schedule can serve a request with that prompt and output (in tokens); empty if one can.

        `name` is for the message. Reads only constants, so any thread may call it.
        """
        total = num_prompt_tokens + max_tokens
        sizes = f"request {name}: prompt of {num_prompt_tokens} tokens + output of up to {max_tokens}"
        if self.max_model_len is not None and total > self.max_model_len:
            return f"{sizes} exceeds the model's context of {self.max_model_len} tokens"
        # The last token is never fed back, so it needs no cache.
        needed, blocks = self.kv.blocks_for(total - 1), self.kv.config.num_gpu_blocks
        if needed > blocks:
            return (
                f"{sizes} needs {needed} cache blocks of {self.kv.block_size} tokens, the GPU pool has {blocks}; "
                "raise num_gpu_blocks or shorten the request"
            )
        return ""

    @property
    def longest_request(self) -> int:
        """Prompt and output tokens of the longest request that is not rejected."""
        room = self.kv.config.num_gpu_blocks * self.kv.block_size + 1
        return room if self.max_model_len is None else min(room, self.max_model_len)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is in the system."""
        return bool(self.jobs) or bool(self._in_flight)

    def run(
        self,
        arrivals: Iterable[Arrival],
        on_done: Callable[[Job], None] | None = None,
        recorder: Recorder | None = None,
    ) -> list[Job]:
        """Serve requests that arrive at known times; returns their jobs, in order of arrival, when all are done.

        `on_done` is called as each job leaves the system. Raises what `step` raises; `last_run` has the jobs then.
        A KeyboardInterrupt ends the engine too. Unfinished jobs, and jobs of requests yet to arrive, are then ABORTED;
        `last_run` has both.

        With `recorder`, jobs and iteration records go there, and `last_run` and `iterations` end up empty. Requests are
        then taken from `arrivals` one at a time, and must be in order of arrival (ValueError if not).
        """
        jobs = self.last_run = []
        take_job = jobs.append if recorder is None else recorder.add_job
        in_order = arrivals if recorder else sorted(arrivals, key=lambda arrival: arrival.request.arrival_s)
        pending = Arrivals(in_order)
        try:
            self._run(pending, take_job, on_done, recorder)
        except KeyboardInterrupt as stop:
            self._end(stop, RequestStatus.ABORTED, "the run was interrupted")
            while pending.next:
                arrival = pending.pop()
                job = Job(arrival.request, arrival.params, self.eos_token_ids)
                job.request.status, job.error = RequestStatus.ABORTED, "the run was interrupted before it arrived"
                take_job(job)
            raise
        finally:
            if recorder:
                recorder.add_iterations(self.iterations)
                self.iterations = IterationLog()
        return jobs

    def _run(
        self,
        pending: Arrivals,
        take_job: Callable[[Job], None],
        on_done: Callable[[Job], None] | None,
        recorder: Recorder | None,
    ) -> None:
        while pending.next or self.has_unfinished:
            now = self.clock.now()
            while pending.next_s <= now:
                arrival = pending.pop()
                job = self.add_request(arrival.request, arrival.params)
                take_job(job)
                if job.is_done and on_done:
                    on_done(job)
            if self.has_unfinished:
                finished = self.step(pending.next_s)
                if on_done:
                    for job in finished:
                        on_done(job)
                if recorder and len(self.iterations) >= CHUNK:
                    iterations, self.iterations = self.iterations, IterationLog()
                    recorder.add_iterations(iterations)
            elif pending.next:
                self.clock.sleep_until(pending.next_s)
        while self.executor.num_transfers_in_flight:
            self.executor.wait(math.inf)
            self._complete_transfers()

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self, until: float = math.inf) -> list[Job]:
        """Take one step; returns the jobs that finished.

        1. If the oldest iteration in flight has ended, collect it and return.
        2. If the first stage is free, decide on the next iteration and submit it.
        3. If the pipeline is now full, collect the oldest iteration. Otherwise wait until the first stage becomes free,
           an iteration or a transfer ends, or the clock reaches `until` (seconds; the next arrival).

        Raises RankError if a rank has failed. Any error ends the engine: every request in the system is FAILED, with
        the reason in `job.error`.
        """
        try:
            return self._step(until)
        except Exception as error:
            cause = blamed(error, type(self.scheduler.policy))
            self._end(cause, RequestStatus.FAILED, failure_reason(cause))
            raise cause from error.__cause__

    def _step(self, until: float) -> list[Job]:
        self._complete_transfers()
        executor, in_flight = self.executor, self._in_flight
        if in_flight:
            if executor.can_collect:
                return self._postprocess(in_flight.popleft(), executor.collect())
            if not executor.can_submit or self._num_jobs_in_flight == len(self.jobs):
                executor.wait(until)
                return []
        iteration = self._decide()
        if self.jumps and not in_flight and not self.observer and self._jump(iteration, until):
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
            jobs[drop.request.request_id].recomputed_tokens += drop.num_recomputed_tokens
        for reuse in iteration.reused:
            job = jobs[reuse.request.request_id]
            job.cached_tokens += reuse.num_found_tokens
            job.recomputed_tokens += reuse.num_recomputed_tokens
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
                f"policy {self.scheduler.policy.name!r} schedules nothing although {len(self.jobs)} requests wait, "
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
        """Charge the time since the last decision to the requests that wait for a transfer."""
        for request in self._stalled:
            job = self.jobs.get(request.request_id)
            if job is not None:  # None if aborted since.
                job.swapping_s += now - self._stalled_since
        if self.observer:
            self.observer.on_swap_wait(self._stalled, self._stalled_since, now)
        self._stalled_since = now

    def _postprocess(self, iteration: Iteration, result: IterationResult) -> list[Job]:
        """Advance every request of the iteration, remove the requests that leave, and record the iteration."""
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
        self.iterations.add(
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
        self._stalled_s = 0.0
        return finished

    def _jump(self, iteration: Iteration, until: float) -> bool:
        """Compute the iteration and the identical ones that follow at once; False if there are too few."""
        if not self._lookahead.jump(iteration, until, self.iterations, self._stalled_s):
            return False
        self._stalled_s = 0.0
        return True

    def _take_scores(self, iteration: Iteration, scores: Mapping[int, Scores]) -> None:
        """Add the log probabilities, by the request's index in the iteration, to its job."""
        for index, request_scores in scores.items():
            job = self.jobs.get(iteration.requests[index].request_id)
            if job is not None and job.logprobs is not None:
                job.logprobs.add(request_scores)

    def _end(self, error: BaseException, status: RequestStatus, reason: str) -> None:
        """End the engine, and every request in the system with this status."""
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

    def _remaining_tokens(self, request: Request) -> int:
        return self.jobs[request.request_id].max_tokens - request.num_tokens
