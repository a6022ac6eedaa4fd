"""IterationPlan: fills one iteration within the batch size, the token budget and the cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastserve.kvcache import Location, Transfer
from fastserve.kvcache.errors import OutOfBlocksError
from fastserve.request import Request
from fastserve.scheduler.iteration import Drop, Iteration

if TYPE_CHECKING:
    from fastserve.scheduler.base import Scheduler


class IterationPlan:
    """The batch being built. Requests are offered most urgent first; each is taken, or left out with nothing changed.

    Cache is taken only from requests that rank behind the one that needs it, worst first, never from one already in
    the plan, and only if that makes enough room. Room that a transfer is still clearing can be counted on, but not
    used: then the plan stalls, that is, the whole batch waits until the transfers it needs have ended.
    """

    def __init__(self, scheduler: Scheduler, now: float, batch_size: int | None = None) -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv
        self._now = now
        self._batch_size = scheduler.config.max_batch_size if batch_size is None else batch_size
        self._tokens_left = scheduler.config.token_budget
        self._num_prefills = 0
        self._batch: list[Request] = []
        self._num_tokens: list[int] = []
        self._promised_blocks = 0
        self._victims: list[Request] | None = None
        self._swap_out: list[Transfer] = []
        self._swap_in: list[Transfer] = []
        self._dropped: list[Drop] = []
        self._must_wait = False

    @property
    def is_full(self) -> bool:
        """Whether the batch has no place left."""
        return len(self._batch) >= self._batch_size

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken."""
        return not self._batch

    def offer(self, request: Request, *, may_evict: bool = True, keep_free: int = 0) -> bool:
        """Take the request with all it has to compute, if it fits.

        `may_evict` allows taking cache from requests that rank behind it; `keep_free` blocks must stay free.
        """
        if request.in_flight or len(self._batch) >= self._batch_size:
            return False
        num_tokens = request.num_tokens - request.num_computed_tokens
        is_prefill = num_tokens > 1 or request.num_computed_tokens == 0
        # A prompt beyond the budget must run some time: as the only prompt of its iteration.
        if is_prefill and num_tokens > self._tokens_left and self._num_prefills:
            return False
        if request.num_tokens > request.cache_capacity and not self._make_resident(request, may_evict, keep_free):
            return False
        if is_prefill:
            self._num_prefills += 1
            self._tokens_left -= num_tokens
        self._batch.append(request)
        self._num_tokens.append(num_tokens)
        return True

    def decide(self, *, others_keep_their_place: bool = False) -> Iteration:
        """Close the plan, tell the policy who started and who was preempted, and return the decision.

        Those who ran and are not in the batch are preempted, unless `others_keep_their_place` (an iteration for
        prompts only) and their cache was not taken.
        """
        scheduler = self._scheduler
        running = scheduler.running
        batch = tuple(self._batch)
        evicted = [transfer.request for transfer in self._swap_out] + [drop.request for drop in self._dropped]
        if self._must_wait:
            preempted = self._preempt(request for request in evicted if request.request_id in running)
            return Iteration(
                swap_out=tuple(self._swap_out),
                swap_in=tuple(self._swap_in),
                dropped=tuple(self._dropped),
                preempted=preempted,
                stalled=batch,
            )
        preempted = ()
        now_running = {request.request_id: request for request in batch}
        if now_running.keys() != running.keys():
            losers = evicted if others_keep_their_place else running.values()
            preempted = self._preempt(
                [r for r in losers if r.request_id in running and r.request_id not in now_running and not r.in_flight]
            )
            for key, request in now_running.items():
                if key not in running:
                    running[key] = request
                    scheduler.on_start(request, self._now)
        return Iteration(
            requests=batch,
            num_scheduled_tokens=tuple(self._num_tokens),
            swap_out=tuple(self._swap_out),
            dropped=tuple(self._dropped),
            preempted=preempted,
        )

    def _make_resident(self, request: Request, may_evict: bool, keep_free: int) -> bool:
        """Get the request onto the GPU with room for its tokens, now or once transfers have ended; False if not."""
        kv = self._kv
        location = kv.location(request)
        if location is Location.SWAPPING_OUT or location is Location.SWAPPING_IN:
            self._must_wait = True
            return True
        needed = kv.blocks_to_hold(request, request.num_tokens)
        if not self._find_room(request, needed, may_evict, keep_free):
            return False
        if needed > kv.num_free_gpu_blocks - self._promised_blocks:
            self._promised_blocks += needed
            self._must_wait = True
        elif location is Location.HOST:
            self._swap_in.append(kv.begin_swap_in(request))
            self._must_wait = True
        else:
            kv.extend(request, request.num_tokens)
        return True

    def _find_room(self, request: Request, needed: int, may_evict: bool, keep_free: int) -> bool:
        """Whether `needed` blocks are free or being cleared, evicting if that is allowed and enough."""
        kv = self._kv
        missing = needed + keep_free + self._promised_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if missing <= 0:
            return True
        if not may_evict:
            return False
        if self._victims is None:
            self._victims = sorted(kv.resident_requests(), key=self._scheduler.rank)
        rank = self._scheduler.rank(request)
        chosen: list[Request] = []
        for victim in reversed(self._victims):
            if self._scheduler.rank(victim) <= rank:
                break
            if victim.in_flight or victim in self._batch:
                continue
            chosen.append(victim)
            missing -= kv.num_blocks(victim)
            if missing <= 0:
                break
        if missing > 0:
            return False
        for victim in chosen:
            self._victims.remove(victim)
            self._evict(victim)
        return True

    def _evict(self, victim: Request) -> None:
        if self._scheduler.swap != "recompute" and victim.num_computed_tokens:
            try:
                self._swap_out.append(self._kv.begin_swap_out(victim))
                return
            except OutOfBlocksError:
                pass  # Host memory is full: dropping is the only way left to make room, and always works.
        self._dropped.append(Drop(victim, self._kv.drop(victim)))

    def _preempt(self, requests: Iterable[Request]) -> tuple[Request, ...]:
        preempted = tuple(requests)
        for request in preempted:
            del self._scheduler.running[request.request_id]
            self._scheduler.on_preempt(request, self._now)
        return preempted
