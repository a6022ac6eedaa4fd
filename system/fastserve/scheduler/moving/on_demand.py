"""swap=reactive and swap=recompute: caches move, or are dropped, when the room is needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from fastserve.core.request import RESIDENT, SWAPPED_OUT, Request
from fastserve.kvcache import KVCacheManager, Location
from fastserve.scheduler.batch import Batch, Terms
from fastserve.scheduler.moving.base import CacheMover
from fastserve.scheduler.queue import ServiceOrder


class _OnDemand(CacheMover):
    """An offered request may take cache from requests that rank behind it.

    Victims are taken last in order first, never from the batch, and only if that makes enough room. Room that a
    transfer is still clearing can be counted on, but not used: then the whole batch waits for it.
    """

    offers_swapped_out = True

    def __init__(self, kv: KVCacheManager, queue: ServiceOrder) -> None:
        super().__init__(kv, queue)
        self._searched: Batch | None = None
        """The batch that the two below belong to."""
        self._victims: list[Request] = []
        self._more_victims: Iterator[Request] = iter(())

    def find_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        kv = self._kv
        if request in self.batch.lost:
            return False
        is_out = request.cache_state == SWAPPED_OUT
        if is_out and kv.location(request) is not Location.HOST:
            self.must_wait = True
            return True
        needed = self._needed_blocks(request, num_tokens)
        if not self._find_blocks(request, needed, terms):
            if terms.or_drop and request.cache_state == RESIDENT:
                self._drop(request)
            return False
        if needed > kv.num_free_gpu_blocks - self.claimed_blocks:
            self.claimed_blocks += needed
            self.must_wait = True
        elif is_out:
            self._begin_swap_in(request)
            self.must_wait = True
        else:
            self._extend(request, num_tokens)
        return True

    @abstractmethod
    def _evict(self, victim: Request) -> None:
        """Take a cache off the GPU."""

    def _find_blocks(self, request: Request, needed: int, terms: Terms) -> bool:
        """Whether `needed` blocks are free or being cleared, evicting if that is allowed and enough."""
        kv = self._kv
        missing = needed + terms.keep_free + self.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if missing <= 0:
            return True
        if not terms.may_evict:
            return False
        chosen: list[Request] = []
        for victim in self._victims_behind(request):
            chosen.append(victim)
            missing -= kv.num_blocks(victim)
            if missing <= 0:
                break
        if missing > 0 and not terms.or_drop:
            return False
        for victim in chosen:
            self._evict(victim)
        return missing <= 0

    def _victims_behind(self, request: Request) -> Iterator[Request]:
        """Resident requests that rank behind this one and take no part, last in order first."""
        if self._searched is not self.batch:
            self._searched, self._victims, self._more_victims = self.batch, [], self._queue.victims()
        index = 0
        while True:
            if index == len(self._victims):
                following = next(self._more_victims, None)
                if following is None:
                    return
                self._victims.append(following)
            victim = self._victims[index]
            if not self._queue.is_before(request, victim):
                return
            if not (victim.in_flight or self.takes_part(victim)):
                yield victim
            index += 1


class SwapOnDemand(_OnDemand):
    """swap=reactive: victims are swapped out, or dropped if host memory is full."""

    def _evict(self, victim: Request) -> None:
        if not (victim.num_computed_tokens and self._begin_swap_out(victim)):
            self._drop(victim)


class DropOnDemand(_OnDemand):
    """swap=recompute: victims are dropped."""

    def _evict(self, victim: Request) -> None:
        self._drop(victim)
