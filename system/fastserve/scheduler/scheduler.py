"""Scheduler: ties a policy, its queue, batches and cache movement together; what the engine talks to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.config import SchedulerConfig
from fastserve.core.errors import ConfigError
from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache import Direction, KVCacheManager, Transfer
from fastserve.scheduler.batch import BEYOND_BUDGET, NO_ROOM, Batch, FindCached
from fastserve.scheduler.iteration import Iteration, IterationResult
from fastserve.scheduler.moving import CacheMover, DropOnDemand, MoveNever, SwapOnDemand
from fastserve.scheduler.options import MemoryOptions
from fastserve.scheduler.policy import Policy
from fastserve.scheduler.queue import Wanted


@mypyc_attr(allow_interpreted_subclasses=True)
class Scheduler:
    """Decides what each iteration runs, by a policy.

    The engine reports arrivals (`add`), ended iterations (`update`) and ended transfers (`complete`), and asks for the
    next decision (`schedule`).
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.config: SchedulerConfig = policy.config
        self.kv: KVCacheManager = policy.kv
        self.queue = policy.queue
        self.running = policy.running
        """Requests with a place in a batch: see `Policy.running`."""
        self.mover = make_mover(policy)
        self._requests: dict[str, Request] = {}
        self._stalled: tuple[Request, ...] = ()
        """The batch that waits for transfers; stays chosen until they have ended."""
        self._limits_waits = policy.waiting.longest_wait_s is not None
        self._find_cached: FindCached | None = self.kv.num_found_tokens if self.kv.caches_prefixes else None
        # A policy pays only for the hooks that it has.
        self._prepares = self._limits_waits or type(policy).prepare is not Policy.prepare
        self._fills = type(policy).fill is not Policy.fill
        self._gates = type(policy).admits is not Policy.admits
        # By name: a class attribute of a subclass in plain Python is not where compiled code looks.
        self._max_passed_over: int = getattr(policy, "max_passed_over")  # noqa: B009
        self._is_clear = False
        """Whether the last decision ran every request it could and moved nothing."""

    # -- requests in and out ---------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Unfinished requests in the system."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """A request has arrived."""
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is already in the system")
        self._requests[request.request_id] = request
        self.mover.arrived(request)
        self.policy.on_add(request)
        if self._limits_waits and self.policy.may_starve(request):
            self.policy.waiting.start(request, request.arrival_s)

    def update(self, iteration: Iteration, result: IterationResult) -> list[Request]:
        """An iteration has ended and the engine has advanced its requests. Returns the requests that leave."""
        policy, start, end = self.policy, result.start_s, result.end_s
        limits_waits, active = self._limits_waits, RequestStatus.ACTIVE
        left = []
        for request in iteration.requests:
            if request.status is active:
                if limits_waits:
                    request.last_ran_s = end
                policy.on_progress(request, start, end)
            else:
                for leaving in policy.leaving(request):
                    self._remove(leaving)
                    left.append(leaving)
        return left

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request and free its cache; KeyError if it is not in the system."""
        self._stalled = ()
        self._remove(self._requests[request_id])

    def complete(self, transfer: Transfer, duration_s: float) -> None:
        """A transfer has ended, after so many seconds on the link."""
        if not transfer.is_complete:
            self.kv.complete(transfer)
            request = transfer.request
            if transfer.direction is Direction.IN and self._requests.get(request.request_id) is request:
                self.queue.refile(request)
                request.num_tokens_at_swap_in = request.num_computed_tokens
        self.policy.on_transfer(transfer, duration_s)

    # -- decisions -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Iteration:
        """Decide the next iteration, at `now` in seconds. One without requests is the decision to wait."""
        if self._stalled and self.kv.num_transfers:
            return Iteration(stalled=self._stalled)
        if self._prepares:
            self.prepare(now)
        iteration = self.decide(now)
        self._stalled = iteration.stalled if self.mover.must_wait else ()
        return iteration

    def prepare(self, now: float) -> None:
        """Let the policy know what time has changed."""
        policy = self.policy
        if self._limits_waits:
            waiting = policy.waiting
            waiting.decide(now)
            for request in policy.starved(now):
                waiting.end(request)
                policy.on_starved(request, now)
        policy.prepare(now)

    def decide(self, now: float) -> Iteration:
        """Fill the batch and start what moves."""
        policy, mover = self.policy, self.mover
        batch = Batch(self.config.max_batch_size, self.config.token_budget, mover.find_room, self._find_cached)
        mover.begin(batch, now)
        if not (self._fills and policy.fill(batch)):
            self._fill_in_order(batch)
            # Requests in flight may leave room when they end.
            if not batch.requests and self._requests and not self.kv.num_transfers and policy.is_idle:
                self._force(batch)
        return self._close(batch, now)

    def _fill_in_order(self, batch: Batch) -> None:
        """Offer the batch to every request that can run, in order, and start the transfers that run beside it."""
        policy, mover = self.policy, self.mover
        requests, places = batch.requests, batch.places
        wanted = Wanted(True, mover.offers_swapped_out)
        num_passed_over = 0
        for request in self.queue.candidates(wanted):
            if request.in_flight or (self._gates and not self._is_admitted(request)):
                continue
            if not batch.take_if_ready(request):
                outcome = batch.offer(request, policy.terms(request, batch))
                if outcome is NO_ROOM:
                    # A request behind it must not take the room that this one waits for.
                    wanted.without_cache = wanted.swapped_out = False
                elif outcome is BEYOND_BUDGET:
                    num_passed_over += 1
                    if num_passed_over > self._max_passed_over:
                        wanted.without_cache = False
            if len(requests) >= places:
                break
        num_chosen = len(requests)
        mover.move()
        self._is_clear = wanted.without_cache and not (
            num_passed_over or mover.stalled or mover.swap_out or mover.swap_in or mover.dropped
        )
        # A request lost its place to a due request, or a dropped cache left room: others may take it.
        if len(requests) < places and (len(requests) < num_chosen or mover.dropped):
            self._fill_up(batch, bool(mover.dropped), num_passed_over)

    def _fill_up(self, batch: Batch, without_cache: bool, num_passed_over: int = 0) -> None:
        """Offer what room is left to requests on the GPU (and to those without a cache, if `without_cache`)."""
        policy = self.policy
        batch.find_room = self.mover.find_spare_room
        wanted = Wanted(without_cache, False)
        for request in self.queue.candidates(wanted):
            if batch.is_full:
                return
            if request in batch.requests or (self._gates and not self._is_admitted(request)):
                continue
            outcome = batch.offer(request, policy.terms(request, batch))
            if outcome is NO_ROOM:
                wanted.without_cache = False
            elif outcome is BEYOND_BUDGET:
                num_passed_over += 1
                if num_passed_over > self._max_passed_over:
                    wanted.without_cache = False

    def _is_admitted(self, request: Request) -> bool:
        return request.cache_state != NO_CACHE or self.policy.admits(request)

    def _force(self, batch: Batch) -> None:
        """Nothing can run and nothing moves: make room for the first request in order by dropping other caches."""
        for first in self.queue.in_order():
            if first.cache_state == SWAPPED_OUT or (self._gates and not self._is_admitted(first)):
                continue
            self.mover.force(first)
            self._fill_up(batch, True)
            return

    def _close(self, batch: Batch, now: float) -> Iteration:
        """Tell queue and policy what was decided, and return it."""
        policy, mover, running = self.policy, self.mover, self.running
        for request in mover.changed:
            self.queue.refile(request)
        requests = batch.requests
        if mover.must_wait:
            preempted = self._preempt([request for request in batch.lost if request.has_place], now)
            return Iteration(
                swap_out=tuple(mover.swap_out),
                swap_in=tuple(mover.swap_in),
                dropped=tuple(mover.dropped),
                preempted=preempted,
                stalled=tuple(requests),
                reused=tuple(mover.reused),
            )
        preempted = ()
        num_kept = 0
        for request in requests:
            request.is_chosen = True
            if request.has_place:
                num_kept += 1
        if num_kept < len(requests) or num_kept < len(running):
            losers: Iterable[Request] = batch.lost if policy.keeps_places else running.values()
            preempted = self._preempt(
                [r for r in losers if r.has_place and not (r.is_chosen or r.in_flight)],
                now,
            )
            for request in requests:
                if not request.has_place:
                    request.has_place = True
                    running[request.request_id] = request
                    policy.waiting.end(request)
                    policy.on_start(request, now)
        for request in requests:
            request.is_chosen = False
        return Iteration(
            tuple(requests),
            tuple(batch.num_tokens),
            tuple(mover.swap_out),
            tuple(mover.swap_in),
            tuple(mover.dropped),
            preempted,
            tuple(mover.stalled),
            policy.padded,
            tuple(mover.reused),
        )

    def _preempt(self, requests: list[Request], now: float) -> tuple[Request, ...]:
        if not requests:
            return ()
        policy, running, limits_waits = self.policy, self.running, self._limits_waits
        for request in requests:
            del running[request.request_id]
            request.has_place = False
            if limits_waits and policy.may_starve(request):
                policy.waiting.start_preempted(request, now)
            policy.on_preempt(request, now)
        return tuple(requests)

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.has_place:
            request.has_place = False
            del self.running[request.request_id]
        self.queue.remove(request)
        self.policy.waiting.end(request)
        self.policy.on_remove(request)
        self.kv.release(request)

    # -- jumps over identical decisions ----------------------------------------------------------------------------

    def steady_until(self, now: float) -> float:
        """Until when (s) decisions may be alike, infinite if not known: a cheap guess before `repeats` is asked."""
        return self.policy.steady_until(now, self._is_clear)

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """How many iterations from the one just decided on would be decided alike, each computing one token more.

        Iteration k would take from `times[k]` to `times[k + 1]` (seconds) with `free_blocks[k]` free on the GPU once it
        is decided. The engine has made sure that until the last of them starts no request arrives or finishes, no
        transfer ends, and every cache can grow.
        """
        count = self.mover.num_quiet(float(times[0]), free_blocks, self._is_clear)
        return self.policy.repeats(times[: count + 1], self._is_clear) if count > 1 else count

    def update_repeated(self, iteration: Iteration, times: np.ndarray) -> None:
        """Iterations alike have ended, one after the other, at `times[1:]`; no request has finished."""
        if self._limits_waits:
            end = float(times[-1])
            for request in iteration.requests:
                request.last_ran_s = end
        self.policy.on_repeated(iteration.requests, times)


def make_mover(policy: Policy) -> CacheMover:
    """What moves caches in the policy's swap mode. Raises ConfigError if the policy lacks the options of that mode."""
    kv, queue, config = policy.kv, policy.queue, policy.config
    if policy.swap == "none":
        return MoveNever(kv, queue)
    if policy.swap == "recompute":
        return DropOnDemand(kv, queue)
    if policy.swap == "reactive":
        return SwapOnDemand(kv, queue)
    options = policy.options
    if not isinstance(options, MemoryOptions):
        name = type(options).__name__
        raise ConfigError(
            f"policy {policy.name!r}: swap=proactive needs more options; derive {name} from MemoryOptions"
        )
    return policy.mover_class()(
        kv,
        queue,
        policy.need_order(),
        options,
        num_places=config.num_places,
        max_batch_size=config.max_batch_size,
    )
