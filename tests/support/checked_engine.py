"""An engine that checks the invariants at every step."""

from fastserve.engine import Engine
from fastserve.job import Job
from fastserve.kvcache import Location
from fastserve.request import Request, RequestStatus
from fastserve.scheduler import Iteration


class CheckedEngine(Engine):
    """Raises AssertionError or CacheError as soon as I1, I2, I3, I4 or I8 does not hold."""

    def _submit(self, iteration: Iteration) -> None:
        in_flight = {id(request) for batch in self._in_flight for request in batch.requests}
        for request in iteration.requests:
            assert self.kv.location(request) is Location.GPU, f"I3: {request.request_id} is scheduled and not resident"
            held = self.kv.num_blocks(request) * self.kv.block_size
            assert request.num_tokens <= held, f"I3: no room for the tokens of {request.request_id}"
            assert id(request) not in in_flight, f"I4: {request.request_id} is in two iterations"
        assert len({id(request) for request in iteration.requests}) == len(iteration.requests)
        assert len(iteration.requests) <= self.scheduler.config.max_batch_size
        if iteration.requests:
            self._check_nobody_idles(iteration)
        super()._submit(iteration)

    def step(self, until: float = float("inf")) -> list[Job]:
        finished = super().step(until)
        self.kv.check_invariants()  # I2
        # I1: whoever is unfinished is known to the engine and to the scheduler, once.
        assert self.scheduler.num_requests == len(self.jobs)
        assert all(job.request.status is RequestStatus.ACTIVE for job in self.jobs.values())
        return finished

    def _check_nobody_idles(self, iteration: Iteration) -> None:
        """I8, for whom each policy calls ready.

        Where requests that do not fit are passed over, anyone resident or without cache is; in order of arrival, only
        the first that was left out; and where prompts go first, nobody else during an iteration for prompts.
        """
        scheduler = self.scheduler
        if len(iteration.requests) >= scheduler.config.max_batch_size:
            return
        chosen = {request.request_id for request in iteration.requests}
        left_out = [request for request in scheduler.in_order() if request.request_id not in chosen]
        if scheduler.name == "vllm":
            if len(scheduler.running) >= scheduler.config.max_batch_size:
                return
            left_out = [request for request in left_out if request.request_id not in scheduler.running]
        scheduled = zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
        prefilled = sum(n for request, n in scheduled if n > 1 or not request.num_computed_tokens)
        for request in left_out:
            if self._fits(request, scheduler.config.token_budget - prefilled, bool(prefilled)):
                raise AssertionError(f"I8: {request.request_id} is ready, fits, and idles")
            if scheduler.head_of_line:
                break

    def _fits(self, request: Request, tokens_left: int, has_prefill: bool) -> bool:
        location = self.kv.location(request)
        if location not in (Location.GPU, Location.NONE):
            return False
        num_tokens = request.num_tokens - request.num_computed_tokens
        is_prefill = num_tokens > 1 or not request.num_computed_tokens
        if is_prefill and has_prefill and num_tokens > tokens_left:
            return False
        spare = getattr(self.scheduler, "watermark_blocks", 0)
        return self.kv.blocks_to_hold(request, request.num_tokens) + spare <= self.kv.num_free_gpu_blocks
