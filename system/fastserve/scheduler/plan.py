"""IterationPlan: fills one iteration within the batch size, the token budget and the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.kvcache import Location, Transfer
from fastserve.kvcache.errors import OutOfBlocksError
from fastserve.scheduler.iteration import Drop, Iteration

if TYPE_CHECKING:
    from fastserve.scheduler.base import Scheduler


class IterationPlan:
    """The batch being built. Requests are offered most urgent first; each is taken, or left out with nothing changed.

    Where caches move on demand (`swap` is reactive or recompute), an offer may take cache from requests that rank
    behind the one that needs it: worst first, never from one already in the plan, and only if that makes enough room.
    Room that a transfer is still clearing can be counted on, but not used: then the whole batch waits for it.

    Where they do not (proactive, none), an offer takes free blocks only, and the batch goes on without those it has to
    leave out.
    """

    __slots__ = (
        "_dropped",
        "_kv",
        "_leaving",
        "_more_victims",
        "_must_wait",
        "_num_passed_over",
        "_num_prefills",
        "_num_tokens",
        "_part_changes",
        "_scheduler",
        "_swap_in",
        "_swap_out",
        "_tokens_left",
        "_victims",
        "admitting",
        "batch",
        "batch_size",
        "claimed_blocks",
        "counting_away",
        "making_room",
        "now",
        "short",
        "stalled",
    )

    def __init__(self, scheduler: Scheduler, now: float, batch_size: int | None = None) -> None:
        self.now = now
        self.batch: list[Request] = []
        self.batch_size = scheduler.config.max_batch_size if batch_size is None else batch_size
        self.admitting = True
        """Whether requests without cache may still be taken: the first that finds no room is the last that is tried."""
        self.counting_away = True
        """Whether requests whose cache is away are still looked at."""
        self.making_room = True
        """Whether others may still have to give up their cache for those who find no room."""
        self.stalled: list[Request] = []
        """Those left out although due, because of a transfer that has not ended."""
        self.short: list[Request] = []
        """Those left out although due, because they find no room."""
        self.claimed_blocks = 0
        """Free blocks, or blocks about to be, that are meant for those left out: no admission may take them."""
        self._scheduler = scheduler
        self._kv = scheduler.kv
        self._num_tokens: list[int] = []
        self._tokens_left = scheduler.config.token_budget
        self._num_prefills = 0
        self._num_passed_over = 0
        self._part_changes: list[tuple[Request, CacheState]] = []
        self._leaving: list[Request] = []
        self._victims: list[Request] = []
        self._more_victims: Iterator[Request] | None = None
        self._swap_out: list[Transfer] = []
        self._swap_in: list[Transfer] = []
        self._dropped: list[Drop] = []
        self._must_wait = False

    @property
    def is_full(self) -> bool:
        """Whether the batch has no place left."""
        return len(self.batch) >= self.batch_size

    @property
    def is_clear(self) -> bool:
        """Whether nobody was left out for want of room or tokens, and nothing moves."""
        return self.admitting and not (
            self._num_passed_over or self.stalled or self._swap_out or self._swap_in or self._dropped
        )

    @property
    def evicts(self) -> bool:
        """Whether anyone loses its cache."""
        return bool(self._leaving)

    @property
    def drops(self) -> bool:
        """Whether anyone's cache is dropped."""
        return bool(self._dropped)

    def takes_part(self, request: Request) -> bool:
        """Whether the request is in the batch, or due and waits for room, or its cache is being taken."""
        return request in self.batch or request in self._leaving or request in self.short

    # -- the batch ---------------------------------------------------------------------------------------------

    def take_if_ready(self, request: Request) -> bool:
        """Take a request, not in flight, that needs nothing but a place: one token to decode, and room for it."""
        num_tokens = request.num_tokens
        if num_tokens > request.cache_capacity or num_tokens - request.num_computed_tokens > 1:
            return False
        if not request.num_computed_tokens:  # A prompt of one token.
            return False
        self.batch.append(request)
        self._num_tokens.append(1)
        return True

    def offer(
        self,
        request: Request,
        *,
        max_tokens: int | None = None,
        hold_tokens: int = 0,
        may_evict: bool = True,
        keep_free: int = 0,
    ) -> bool:
        """Take the request with all it has to compute (or `max_tokens` of that), if it fits.

        `hold_tokens` makes room for more tokens than that; `may_evict` allows taking cache from requests that rank
        behind it; `keep_free` blocks must stay free.
        """
        if request.in_flight or len(self.batch) >= self.batch_size:
            return False
        num_tokens = request.num_tokens - request.num_computed_tokens
        if max_tokens is not None and num_tokens > max_tokens:
            num_tokens = max_tokens
        is_prefill = num_tokens > 1 or not request.num_computed_tokens
        # A prompt beyond the budget must run some time: as the only prompt of its iteration.
        if is_prefill and num_tokens > self._tokens_left and self._num_prefills:
            self._num_passed_over += 1
            if self._num_passed_over > self._scheduler.max_passed_over:
                self.admitting = False
            return False
        hold = max(request.num_computed_tokens + num_tokens, hold_tokens)
        if hold > request.cache_capacity and not self._make_resident(request, hold, may_evict, keep_free):
            if request.cache_state != RESIDENT or request in self._leaving:
                # Whoever comes later must not take the room that this one waits for.
                self.admitting = self.counting_away = False
            return False
        if is_prefill:
            self._num_prefills += 1
            self._tokens_left -= num_tokens
        self.batch.append(request)
        self._num_tokens.append(num_tokens)
        return True

    def offer_chunk(self, request: Request, max_tokens: int, **terms: Any) -> int:
        """Take the request with at most `max_tokens` of what it has to compute, on `offer`'s terms.

        Returns how many it takes, 0 if it does not fit.
        """
        return self._num_tokens[-1] if self.offer(request, max_tokens=max_tokens, **terms) else 0

    def offer_padding(self, request: Request) -> None:
        """Take a finished request as a row that is computed for nothing."""
        self.batch.append(request)
        self._num_tokens.append(0)

    def close(self, *, others_keep_their_place: bool = False, padded: bool = False) -> Iteration:
        """End the plan, tell the policy who started and who was preempted, and return the decision.

        Those who ran, are not in flight and not in the batch are preempted, unless `others_keep_their_place` (an
        iteration for prompts only) and their cache was not taken.
        """
        scheduler = self._scheduler
        running = scheduler.running
        for request, part in self._part_changes:
            scheduler.queue.put(request, part)
        batch = self.batch
        if self._must_wait:
            preempted = self._preempt([r for r in self._leaving if r.request_id in running])
            return Iteration(
                swap_out=tuple(self._swap_out),
                swap_in=tuple(self._swap_in),
                dropped=tuple(self._dropped),
                preempted=preempted,
                stalled=tuple(batch),
            )
        preempted = ()
        now_running = {request.request_id: request for request in batch}
        if now_running != running:
            losers: Iterable[Request] = self._leaving if others_keep_their_place else running.values()
            preempted = self._preempt(
                [r for r in losers if r.request_id not in now_running and r.request_id in running and not r.in_flight]
            )
            for key, request in now_running.items():
                if key not in running:
                    running[key] = request
                    scheduler.on_start(request, self.now)
        return Iteration(
            tuple(batch),
            tuple(self._num_tokens),
            tuple(self._swap_out),
            tuple(self._swap_in),
            tuple(self._dropped),
            preempted,
            tuple(self.stalled),
            padded,
        )

    # -- what moves --------------------------------------------------------------------------------------------

    def swap_in(self, request: Request) -> None:
        """Start to bring a cache back from host memory."""
        self._swap_in.append(self._kv.begin_swap_in(request))

    def evict(self, victim: Request, *, or_drop: bool = True) -> bool:
        """Take a resident request's cache: to host memory, or, if that is full or not to be used, drop it.

        Without `or_drop` nothing is dropped; then False if host memory is full.
        """
        if self._scheduler.swap in ("reactive", "proactive") and victim.num_computed_tokens:
            try:
                self._swap_out.append(self._kv.begin_swap_out(victim))
            except OutOfBlocksError:
                if not or_drop:
                    return False
            else:
                self._leave(victim, SWAPPED_OUT)
                return True
        self._drop(victim)
        return True

    def force(self, request: Request) -> None:
        """Make room for one request by dropping others, last in order first: nothing else can run or move."""
        self.claimed_blocks = 0
        needed = self._kv.blocks_to_hold(request, request.num_tokens)
        for victim in self._scheduler.queue.victims():
            if needed <= self._kv.num_free_gpu_blocks:
                break
            if victim is not request and not victim.in_flight:
                self._drop(victim)
        self.offer(request)

    def _drop(self, victim: Request) -> None:
        """Give up a cache. That makes room at once and needs none elsewhere, so it always works."""
        self._dropped.append(Drop(victim, self._kv.drop(victim)))
        self._leave(victim, NO_CACHE)

    def _leave(self, victim: Request, part: CacheState) -> None:
        if victim in self.batch:
            index = self.batch.index(victim)
            del self.batch[index], self._num_tokens[index]
        self._leaving.append(victim)
        self._part_changes.append((victim, part))

    def _make_resident(self, request: Request, hold: int, may_evict: bool, keep_free: int) -> bool:
        """Get the request onto the GPU with room for its tokens, now or once transfers have ended; False if not."""
        kv = self._kv
        if request in self._leaving:
            return False
        if request.cache_state == SWAPPED_OUT and kv.location(request) is not Location.HOST:
            self._must_wait = True
            return True
        needed = kv.blocks_for(hold) if request.cache_state == NO_CACHE else kv.blocks_to_hold(request, hold)
        if not self._scheduler.moves_on_demand:
            return self._take_free(request, hold, needed, keep_free)
        if not self._find_room(request, needed, may_evict, keep_free):
            return False
        if needed > kv.num_free_gpu_blocks - self.claimed_blocks:
            self.claimed_blocks += needed
            self._must_wait = True
        elif request.cache_state == SWAPPED_OUT:
            self.swap_in(request)
            self._must_wait = True
        else:
            self._extend(request, hold)
        return True

    def _take_free(self, request: Request, hold: int, needed: int, keep_free: int) -> bool:
        """Give a request free blocks. Those already resident may take what is meant for others: they need few."""
        kv = self._kv
        meant_for_others = keep_free + (self.claimed_blocks if request.cache_state == NO_CACHE else 0)
        if needed + meant_for_others > kv.num_free_gpu_blocks:
            self._scheduler.on_no_room(self, request, needed)
            if needed + meant_for_others > kv.num_free_gpu_blocks:
                return False
        self._extend(request, hold)
        return True

    def _extend(self, request: Request, hold: int) -> None:
        self._kv.extend(request, hold)
        if request.cache_state == NO_CACHE:
            self._part_changes.append((request, RESIDENT))

    def _find_room(self, request: Request, needed: int, may_evict: bool, keep_free: int) -> bool:
        """Whether `needed` blocks are free or being cleared, evicting if that is allowed and enough."""
        kv = self._kv
        missing = needed + keep_free + self.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if missing <= 0:
            return True
        if not may_evict:
            return False
        chosen: list[Request] = []
        for victim in self._victims_behind(request):
            chosen.append(victim)
            missing -= kv.num_blocks(victim)
            if missing <= 0:
                break
        if missing > 0:
            return False
        for victim in chosen:
            self.evict(victim)
        return True

    def _victims_behind(self, request: Request) -> Iterator[Request]:
        """Resident requests that rank behind this one and are not in the plan, last in order first."""
        if self._more_victims is None:
            self._more_victims = self._scheduler.queue.victims()
        index = 0
        while True:
            if index == len(self._victims):
                following = next(self._more_victims, None)
                if following is None:
                    return
                self._victims.append(following)
            victim = self._victims[index]
            if not self._scheduler.queue.is_before(request, victim):
                return
            if not (victim.in_flight or self.takes_part(victim)):
                yield victim
            index += 1

    def _preempt(self, requests: list[Request]) -> tuple[Request, ...]:
        scheduler = self._scheduler
        for request in requests:
            del scheduler.running[request.request_id]
            scheduler.on_preempt(request, self.now)
        return tuple(requests)
