"""swap=proactive: caches move beside the computation, ahead of need (paper, section 4.2)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import RESIDENT, SWAPPED_OUT, Request
from fastserve.kvcache import KVCacheManager
from fastserve.kvcache.manager import HOST
from fastserve.scheduler.batch import Terms
from fastserve.scheduler.moving.base import CacheMover
from fastserve.scheduler.need import InServiceOrder, NeedOrder
from fastserve.scheduler.options import MemoryOptions
from fastserve.scheduler.queue import ServiceOrder


@mypyc_attr(allow_interpreted_subclasses=True)
class MoveAhead(CacheMover):
    """Decides what moves beside an iteration; the batch runs without swapped-out requests.

    Two things start transfers. A request that is due (it would have a place in the batch, were its cache on the GPU) is
    swapped in, and room is made for a request without cache that finds none; both in the order of service, at the cost
    of the requests needed last (`NeedOrder`). Then, within the budget, the requests needed next are swapped in ahead of
    time, in exchange for those needed later, and the reserve is filled up.

    If host memory is full, requests off the GPU wait, as in a system without preemption. A cache is dropped and
    recomputed only for the first request that is due: if its cache is on the GPU and must grow, or if the requests in
    its queue and above fit one batch (more of them would take turns in dropping each other's caches). Nothing is
    dropped to swap a request in ahead of time.
    """

    offers_swapped_out = False

    def __init__(
        self,
        kv: KVCacheManager,
        queue: ServiceOrder,
        need: NeedOrder,
        options: MemoryOptions,
        *,
        num_places: int,
        max_batch_size: int,
    ) -> None:
        super().__init__(kv, queue)
        self._need = need
        self._num_places = num_places
        self._max_batch_size = max_batch_size
        self._budget = options.swap_budget_blocks
        self._stay_tokens = options.stay_tokens
        self._window_s = options.reserve_window_s
        self._keeps_history = options.reserve == "history"
        self._most_reserved = options.most_reserved(kv.config.num_gpu_blocks)
        self._for_batch = min(num_places, self._most_reserved)
        # In the order of service a search may end where that order does.
        self._in_service_order = isinstance(need, InServiceOrder)
        self._arrivals: deque[tuple[float, int]] = deque()
        self._arrived_blocks = 0
        self._version_seen = -1
        self._version_without_victims = -1
        self._victims: Iterator[Request] | None = None

    def arrived(self, request: Request) -> None:
        """Note an arrival for the reserve."""
        if self._keeps_history:
            blocks = self._kv.blocks_for(request.num_tokens)
            self._arrivals.append((request.arrival_s, blocks))
            self._arrived_blocks += blocks

    def reserve(self, now: float) -> int:
        """Blocks to keep idle: what the arrivals of the last window took, and a block for each place in the batch."""
        arrivals = self._arrivals
        while arrivals and arrivals[0][0] < now - self._window_s:
            self._arrived_blocks -= arrivals.popleft()[1]
        return min(self._for_batch + self._arrived_blocks, self._most_reserved)

    def num_quiet(self, now: float, free_blocks: np.ndarray, is_clear: bool) -> int:  # noqa: D102 (as in CacheMover)
        if not is_clear:
            return 1
        if self._version_without_victims == self._queue.version:
            return len(free_blocks)
        enough = free_blocks + self._kv.num_vacating_blocks >= self.reserve(now)
        return len(enough) if enough.all() else max(1, int(np.argmin(enough)))

    def find_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:  # noqa: D102 (as in CacheMover)
        if self._take_free(request, num_tokens, terms):
            return True
        if request.cache_state == SWAPPED_OUT or request in self.batch.lost:
            return False
        self.make_room(request, self._needed_blocks(request, num_tokens))
        return self._take_free(request, num_tokens, terms)

    def find_spare_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """Give the request free blocks; no other request makes room for it."""
        return self._take_free(request, num_tokens, terms)

    def evict(self, victim: Request, *, or_drop: bool) -> bool:
        """Swap out a resident request, or, if host memory is full and `or_drop`, drop its cache; False if neither."""
        if victim.num_computed_tokens:
            if self._begin_swap_out(victim):
                return True
            if not or_drop:
                return False
        self._drop(victim)
        return True

    # -- requests that are due ---------------------------------------------------------------------------------

    def make_room(self, request: Request, needed: int) -> None:
        """A request that is due and not swapped out finds no room: clear some, most likely for a later iteration."""
        if not self.short:
            self._victims = None
        room_comes = self._make_room(request, needed, self.reserve(self.now), is_first=not self.stalled)
        if needed + self.claimed_blocks <= self._kv.num_free_gpu_blocks:
            return  # Something was dropped, and the room is there already.
        self.short.append(request)
        if room_comes:
            self.claimed_blocks += needed
        # It waits for a transfer only as long as room is being cleared.
        if self._kv.num_vacating_blocks:
            self.stalled.append(request)

    def move(self) -> None:
        """Start what moves beside the batch, which has been filled."""
        all_served = not self.short
        if self._queue.num_swapped_out:
            all_served = self._swap_in_due() and all_served
        elif all_served and self._kv.num_free_gpu_blocks >= self._most_reserved:
            return
        self.move_ahead(exchange=all_served)

    def _swap_in_due(self) -> bool:
        """Swap in the requests that would have a place in the batch if they were not swapped out, within the budget.

        Returns whether all of them are in transfer or have room coming.
        """
        kv = self._kv
        queue, batch = self._queue, list(self.batch.requests)
        places = self.batch.places - len(self.stalled)
        num_before = 0
        self._victims = None
        starts = kv.num_arriving_blocks < self._budget or kv.num_vacating_blocks < self._budget
        for request in self._queue.swapped_out():
            while num_before < len(batch) and queue.is_before(batch[num_before], request):
                num_before += 1
            if num_before >= places:
                break
            places -= 1
            first = not self.stalled
            self.stalled.append(request)
            # No request overtakes one that must wait now, and more room than a budget is of no use.
            if starts and request.location is HOST:
                starts = self.bring_in(request, is_first=first) and self.claimed_blocks < self._budget
        return starts

    def bring_in(self, request: Request, *, is_first: bool) -> bool:
        """Start to swap in a request that is due, or to clear room for it; False if budget or room is used up."""
        kv = self._kv
        needed = kv.blocks_for(request.num_tokens)
        reserve = self.reserve(self.now)
        if self._start(request, needed, reserve):
            return True
        room_comes = self._make_room(request, needed, reserve, is_first=is_first)
        # If no more room is coming, the reserve gives way.
        if not kv.num_vacating_blocks and self._start(request, needed, 0):
            return True
        if room_comes:
            self.claimed_blocks += needed
        return room_comes

    def _make_room(self, request: Request, needed: int, reserve: int, *, is_first: bool) -> bool:
        """Take caches from requests behind this one, the one needed last first, if that makes enough room at all.

        Returns whether the room is there or coming.
        """
        kv = self._kv
        coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - self.claimed_blocks
        wanted = needed + reserve
        if coming >= wanted:
            return True
        if kv.num_vacating_blocks >= self._budget:
            return False
        # A running request needs little, and gets it. A whole cache is worth another only if the two take no turns.
        may_drop = is_first and (request.cache_state == RESIDENT or self._queue.fits(request, self._num_places))
        # No cache can leave. (In another order the search goes on, since the next request passes over what it finds.)
        if self._in_service_order and not (may_drop or kv.num_free_host_blocks):
            return coming >= needed
        victims, found = [], coming
        # Callers come in priority order, so the iterator can be reused.
        self._victims = self._victims or self._need.victims(self.now)
        queue = self._queue
        for victim in self._victims:
            if not queue.is_before(request, victim):
                if self._in_service_order:
                    break
            elif self._may_leave(victim):
                victims.append(victim)
                found += kv.num_blocks(victim)
                if found >= wanted:
                    break
        if found < wanted:
            # Last of all, requests of the batch that rank behind; one at a time, so that the others run meanwhile.
            for victim in reversed(self.batch.requests) if is_first and not kv.num_transfers else ():
                if found >= needed or not self._queue.is_before(request, victim):
                    break
                if victim.num_computed_tokens - victim.num_tokens_at_swap_in > self._stay_tokens:
                    victims.append(victim)
                    found += kv.num_blocks(victim)
        if found < needed:
            self._victims = itertools.chain(victims, self._victims)
            return False
        for victim in victims:
            if kv.num_vacating_blocks >= self._budget or coming >= wanted:
                break
            blocks = kv.num_blocks(victim)
            # The reserve is worth a transfer, not a recomputation.
            if not self.evict(victim, or_drop=may_drop and coming < needed):
                break
            coming += blocks
        return coming >= needed

    # -- ahead of need -----------------------------------------------------------------------------------------

    def move_ahead(self, *, exchange: bool) -> None:
        """Fill the reserve. Before that, with `exchange`, swap in the requests needed next.

        They get idle blocks, or blocks of requests needed later. Searches are repeated only when the queue has changed.
        """
        kv = self._kv
        reserve = self.reserve(self.now)
        version = self._queue.version
        if exchange and version != self._version_seen:
            self._version_seen = version
            # Requests that are swapped out and not in transfer.
            if self._queue.num_swapped_out > kv.num_transfers and kv.num_arriving_blocks < self._budget:
                self._exchange(reserve)
        short = reserve + self.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        may_leave = kv.num_vacating_blocks < self._budget and kv.num_free_host_blocks
        if short > 0 and version != self._version_without_victims and may_leave:
            for victim in self._need.victims(self.now):
                if self._may_leave(victim) and self._has_run(victim):
                    short -= kv.num_blocks(victim)
                    if not self.evict(victim, or_drop=False) or short <= 0 or kv.num_vacating_blocks >= self._budget:
                        return
            self._version_without_victims = version

    def _exchange(self, reserve: int) -> None:
        kv = self._kv
        need = self._need
        now = self.now
        candidates = None
        for request in need.swapped_out(now):
            if request.location is not HOST or request in self.stalled:
                continue
            needed = kv.blocks_for(request.num_tokens)
            if self._start(request, needed, reserve):
                continue
            coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - self.claimed_blocks - reserve
            victims = []
            if coming < needed and kv.num_vacating_blocks < self._budget:
                key = need.key(request, now)
                candidates = candidates or need.victims(now)
                for victim in candidates:
                    if need.key(victim, now) <= key:
                        break
                    if self._may_leave(victim) and self._has_run(victim):
                        victims.append(victim)
                        coming += kv.num_blocks(victim)
                        if coming >= needed:
                            break
                for victim in victims if coming >= needed else ():
                    if kv.num_vacating_blocks >= self._budget or not self.evict(victim, or_drop=False):
                        return
            if coming < needed:
                return
            self.claimed_blocks += needed
            if kv.num_arriving_blocks >= self._budget or kv.num_vacating_blocks >= self._budget:
                return

    def _start(self, request: Request, needed: int, reserve: int) -> bool:
        """Start to swap a request in, unless blocks are short or meant for others, or the budget is used up."""
        kv = self._kv
        free = kv.num_free_gpu_blocks
        # With the reserve it may never fit a small cache; if nothing else is on the GPU, there is nothing to wait for.
        alone = free + kv.num_vacating_blocks == kv.config.num_gpu_blocks
        if kv.num_arriving_blocks >= self._budget or needed + self.claimed_blocks + (0 if alone else reserve) > free:
            return False
        self._begin_swap_in(request)
        return True

    def _may_leave(self, victim: Request) -> bool:
        return not (victim.in_flight or self.takes_part(victim))

    def _has_run(self, victim: Request) -> bool:
        """Whether it has run since its last swap-in; if not, that transfer was for nothing, and the next may be."""
        return victim.num_computed_tokens != victim.num_tokens_at_swap_in
