"""An engine that checks the invariants at every step."""

import itertools
from typing import Any

from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.engine import Engine, Job
from fastserve.kvcache import Direction, Location
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
        # `wait_for_swaps=false` of fastserve-artifact: then it is known which request has a block, not what is in it.
        self._waits_for_copies = not self.scheduler.policy.options.simulation_only_reason
        self._held: dict[tuple[Direction, int], tuple[Request, int, int]] = {}
        """What each block holds, on the side that a transfer in this direction leaves: so many tokens of the request's
        block with this index."""

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
            if self._waits_for_copies:
                self._check_held(request)
            self._hold(request, request.num_computed_tokens + num_scheduled)
        assert len({id(request) for request in iteration.requests}) == len(iteration.requests)
        assert len(iteration.requests) <= self.scheduler.config.max_batch_size
        for request in (
            *iteration.preempted,
            *(drop.request for drop in iteration.dropped),
            *(transfer.request for transfer in iteration.swap_out),
        ):
            assert id(request) not in in_flight, f"{request.request_id} is in flight and loses its place or its cache"
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            other_side = Direction.IN if transfer.direction is Direction.OUT else Direction.OUT
            for source, destination in zip(transfer.source, transfer.destination, strict=True):
                self._held[other_side, destination] = self._held[transfer.direction, source]
        # Where caches move on demand, the whole batch may wait.
        if iteration.requests or (in_flight and not iteration.stalled):
            self._check_no_request_idles(iteration)
        super()._submit(iteration)
        assert len(self._in_flight) <= self.executor.max_in_flight
        assert sum(job.request.in_flight for job in self.jobs.values()) == self._num_jobs_in_flight
        self._ran_last = set(self.scheduler.running)

    def _jump(self, iteration: Iteration, until: float) -> bool:
        jumped = super()._jump(iteration, until)
        if jumped:
            for request in iteration.requests:
                self._hold(request, request.num_computed_tokens)
        return jumped

    def _hold(self, request: Request, num_tokens: int) -> None:
        """The request's blocks hold so many of its tokens."""
        size = self.kv.block_size
        for index, block in enumerate(request.gpu_blocks[: self.kv.blocks_for(num_tokens)]):
            self._held[Direction.OUT, block] = request, index, min(size, num_tokens - index * size)

    def _check_held(self, request: Request) -> None:
        """I3: blocks hold what the request has computed, whatever was done with them since."""
        num_tokens, size = request.num_computed_tokens, self.kv.block_size
        for index, block in enumerate(request.gpu_blocks[: self.kv.blocks_for(num_tokens)]):
            owner, place, count = self._held[Direction.OUT, block]
            assert (owner, place) == (request, index), f"I3: {request.request_id} reads another's block {block}"
            assert count >= min(size, num_tokens - index * size), f"I3: {request.request_id} reads what is not there"

    def step(self, until: float = float("inf")) -> list[Job]:
        finished = super().step(until)
        self.kv.check_invariants()  # I2
        # I1: engine and scheduler each know every unfinished request once; the scheduler also knows requests aborted
        # in flight.
        in_flight = [request for iteration in self._in_flight for request in iteration.requests]
        aborted = sum(request.status is RequestStatus.ABORTED for request in in_flight)
        assert self.scheduler.num_requests == len(self.jobs) + aborted
        assert all(request.request_id in self.scheduler.running for request in in_flight)
        # A request with its last token may be held back until its batch ends.
        known = (RequestStatus.ACTIVE, RequestStatus.FINISHED)
        assert all(job.request.status in known for job in self.jobs.values())
        return finished

    def _check_no_request_idles(self, iteration: Iteration) -> None:
        """I8, for the requests that each policy calls ready.

        A request is ready if its cache is on the GPU. Requests without a cache that the policy admits are ready in
        order, up to the first that finds no room (a later request must not take what that one waits for) or until too
        many exceed the token budget. Where prompts go first, no other request is ready during an iteration for prompts.
        """
        scheduler = self.scheduler
        if len(iteration.requests) >= scheduler.config.max_batch_size or scheduler.policy.name == "run-to-completion":
            return
        if (iteration.swap_out or iteration.swap_in) and not self._waits_for_copies:
            return  # What moves beside the batch, once that is filled, counts as moved by the same decision.
        chosen = {request.request_id for request in iteration.requests}
        dropped = [drop.request for drop in iteration.dropped]
        left_out = [request for request in self._order if request.request_id not in chosen]
        if scheduler.policy.name.startswith("vllm"):
            # An iteration that drops a cache admits no request.
            if iteration.dropped or len(scheduler.running) >= scheduler.config.num_places:
                return
            decodes = all(request.is_decoding for request in iteration.requests)
            left_out = [request for request in left_out if request.request_id not in scheduler.running]
            if not chosen <= self._ran_last and decodes:
                return  # A swapped-out request resumes before a prompt is admitted.
            if scheduler.policy.name == "vllm" and not decodes:
                # In order: a swapped-out request holds up the prompts behind it.
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
        # Free room may be meant for requests that wait for a transfer.
        admitting, passed_over = not iteration.stalled, 0
        for request in left_out:
            if request.in_flight:
                continue
            if request.cache_state == SWAPPED_OUT:
                admitting = admitting and scheduler.policy.swap == "proactive" and self._waits_for_copies
                continue
            if request.cache_state == NO_CACHE and not scheduler.policy.admits(request):
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
                break  # In order of arrival, requests that already have a cache included.
