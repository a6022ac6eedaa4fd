"""An engine that checks the invariants at every step."""

import itertools
from typing import Any

from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.engine import Engine, Job
from fastserve.kvcache import Location
from fastserve.scheduler import Iteration


class CheckedEngine(Engine):
    """Raises AssertionError or CacheError as soon as I1, I2, I3, I4 or I8 does not hold."""

    _ran_last: frozenset[str] | set[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order: list[Request] = []
        """The order of service that the last decision found: to lose a cache may cost a request its place."""
        decide = self.scheduler.decide

        def look_and_decide(now: float) -> Iteration:
            self._order = list(self.scheduler.queue.in_order())
            return decide(now)

        self.scheduler.decide = look_and_decide  # type: ignore[method-assign]

    def _submit(self, iteration: Iteration) -> None:
        in_flight = {id(request) for batch in self._in_flight for request in batch.requests}
        for request, num_scheduled in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            assert id(request) not in in_flight, f"I4: {request.request_id} is in two iterations"
            if not num_scheduled:
                continue  # Padding has no cache.
            assert self.kv.location(request) is Location.GPU, f"I3: {request.request_id} is scheduled and not resident"
            held = self.kv.num_blocks(request) * self.kv.block_size
            assert request.num_computed_tokens + num_scheduled <= held, (
                f"I3: no room for the tokens of {request.request_id}"
            )
        assert len({id(request) for request in iteration.requests}) == len(iteration.requests)
        assert len(iteration.requests) <= self.scheduler.config.max_batch_size
        for request in (
            *iteration.preempted,
            *(drop.request for drop in iteration.dropped),
            *(transfer.request for transfer in iteration.swap_out),
        ):
            assert id(request) not in in_flight, f"{request.request_id} is in flight and loses its place or its cache"
        # Where caches move on demand, the whole batch may wait.
        if iteration.requests or (in_flight and not iteration.stalled):
            self._check_nobody_idles(iteration)
        super()._submit(iteration)
        assert len(self._in_flight) <= self.executor.max_in_flight
        assert sum(job.request.in_flight for job in self.jobs.values()) == self._num_jobs_in_flight
        self._ran_last = set(self.scheduler.running)

    def step(self, until: float = float("inf")) -> list[Job]:
        finished = super().step(until)
        self.kv.check_invariants()  # I2
        # I1: whoever is unfinished is known to the engine and to the scheduler, once; to the latter, whoever was
        # aborted in flight as well.
        in_flight = [request for iteration in self._in_flight for request in iteration.requests]
        aborted = sum(request.status is RequestStatus.ABORTED for request in in_flight)
        assert self.scheduler.num_requests == len(self.jobs) + aborted
        assert all(request.request_id in self.scheduler.running for request in in_flight)
        # One that has its last token may be held back until its batch ends.
        known = (RequestStatus.ACTIVE, RequestStatus.FINISHED)
        assert all(job.request.status in known for job in self.jobs.values())
        return finished

    def _check_nobody_idles(self, iteration: Iteration) -> None:
        """I8, for whom each policy calls ready.

        Anyone whose cache is on the GPU; and of those without cache, in order, all up to the first that finds no room
        (whoever comes behind must not take what that one waits for), or no tokens left too often. Where prompts go
        first, nobody else during an iteration for prompts.
        """
        scheduler = self.scheduler
        if len(iteration.requests) >= scheduler.config.max_batch_size or scheduler.policy.name == "run-to-completion":
            return
        chosen = {request.request_id for request in iteration.requests}
        dropped = [drop.request for drop in iteration.dropped]
        left_out = [request for request in self._order if request.request_id not in chosen]
        if scheduler.policy.name.startswith("vllm"):
            # Nobody is let in by an iteration that drops a cache.
            if iteration.dropped or len(scheduler.running) >= scheduler.config.num_places:
                return
            decodes = all(request.is_decoding for request in iteration.requests)
            left_out = [request for request in left_out if request.request_id not in scheduler.running]
            if not chosen <= self._ran_last and decodes:
                return  # Whoever was swapped out resumes before a prompt is let in.
            if scheduler.policy.name == "vllm" and not decodes:
                # In order: whoever was swapped out holds up the prompts behind it.
                left_out = list(itertools.takewhile(lambda request: not request.is_decoding, left_out))
        scheduled = zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
        prefilled = sum(n for request, n in scheduled if n > 1 or not request.num_computed_tokens)
        tokens_left = scheduler.config.token_budget - prefilled
        if scheduler.policy.name == "vllm-chunked":
            tokens_left = scheduler.policy.tokens_per_iteration - sum(iteration.num_scheduled_tokens)
            if not tokens_left:
                return
        if all(request.is_decoding for request in iteration.requests):
            for request in scheduler.running.values():
                idles = request.is_decoding and not request.in_flight and request.request_id not in chosen
                assert not idles or request.num_tokens > request.cache_capacity, f"I8: {request.request_id} idles"
        # Room that is there may be meant for those who wait for a transfer.
        admitting, passed_over = not iteration.stalled, 0
        for request in left_out:
            if request.in_flight:
                continue
            if request.cache_state == SWAPPED_OUT:
                admitting = admitting and scheduler.policy.swap == "proactive"
                continue
            if request.cache_state == NO_CACHE and (not admitting or request in dropped):
                admitting = False
                continue
            num_tokens = request.num_tokens - request.num_computed_tokens
            whole = not request.is_decoding and scheduler.policy.name != "vllm-chunked"
            if whole and prefilled and num_tokens > tokens_left:
                passed_over += 1
                admitting = admitting and passed_over <= scheduler.policy.max_passed_over
                continue
            reserved = getattr(scheduler.policy, "tokens_to_hold", lambda request: request.num_tokens)(request)
            spare = getattr(scheduler.policy, "watermark_blocks", 0)
            if self.kv.blocks_to_hold(request, reserved) + spare <= self.kv.num_free_gpu_blocks:
                raise AssertionError(f"I8: {request.request_id} is ready, fits, and idles")
            admitting = admitting and request.cache_state != NO_CACHE
            if scheduler.policy.name.startswith("vllm"):
                break  # In order of arrival, whoever has a cache already not excepted.
