"""CacheMover: gives requests room for their caches, and records what moves by the current decision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Request
from fastserve.kvcache import KVCacheManager, Transfer
from fastserve.kvcache.errors import OutOfBlocksError
from fastserve.scheduler.batch import Batch, Terms
from fastserve.scheduler.iteration import Drop, Reuse
from fastserve.scheduler.queue import ServiceOrder


@mypyc_attr(allow_interpreted_subclasses=True)
class CacheMover(ABC):
    """Decides which caches move, beside or before the batch of a decision.

    A decision calls `begin`, then fills its batch, which calls `find_room`, then `move`; afterwards the record says
    what moves. A request that lost its cache by a decision gets no room in it.
    """

    offers_swapped_out: ClassVar[bool]
    """Whether a swapped-out request is offered a place in the batch: its cache is then moved at once."""

    def __init__(self, kv: KVCacheManager, queue: ServiceOrder) -> None:
        self._kv = kv
        self._queue = queue
        self.begin(Batch(0, 0, self.find_room), 0.0)

    def begin(self, batch: Batch, now: float) -> None:
        """Start the record of a decision, taken at `now` (seconds), that fills `batch`."""
        self.batch = batch
        self.now = now
        self.swap_out: list[Transfer] = []
        self.swap_in: list[Transfer] = []
        self.dropped: list[Drop] = []
        self.reused: list[Reuse] = []
        self.changed: list[Request] = []
        """Requests whose cache state changed, in the order of the changes; the queue is told after the decision."""
        self.stalled: list[Request] = []
        """Requests left out although due, because of a transfer that has not ended."""
        self.short: list[Request] = []
        """Requests left out although due, because they find no room."""
        self.claimed_blocks = 0
        """Free blocks, or blocks about to be free, that are meant for requests left out: no admission takes them."""
        self.must_wait = False
        """Whether the whole batch waits for a transfer."""

    @abstractmethod
    def find_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """Get the request onto the GPU with room for `num_tokens`, now or once transfers have ended; False if not."""

    def find_spare_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """The same in a second pass over the queue, for room that the first has left."""
        return self.find_room(request, num_tokens, terms)

    def move(self) -> None:  # noqa: B027 (most modes move nothing)
        """Start what moves beside the batch, which has been filled."""

    def arrived(self, request: Request) -> None:  # noqa: B027 (most modes keep no history)
        """Note an arrival."""

    def num_quiet(self, now: float, free_blocks: np.ndarray, is_clear: bool) -> int:
        """How many decisions from the last one on move nothing and admit no request, if the queue does not change.

        Decision k finds `free_blocks[k]` free on the GPU; `is_clear`: the last one ran every request it could and moved
        nothing.
        """
        return len(free_blocks)

    def takes_part(self, request: Request) -> bool:
        """Whether the request is in the batch, or due and waits for room, or loses its cache."""
        return request in self.batch.requests or request in self.batch.lost or request in self.short

    def force(self, request: Request) -> None:
        """Make room for one request by dropping others, last in order first: nothing else can run or move."""
        self.claimed_blocks = 0
        needed = self._kv.blocks_to_hold(request, request.num_tokens)
        for victim in self._queue.victims():
            if needed <= self._kv.num_free_gpu_blocks:
                break
            # This decision may have swapped it out already.
            if victim is not request and not victim.in_flight and victim.cache_state == RESIDENT:
                self._drop(victim)
        self.batch.offer(request)

    # -- for the classes below -----------------------------------------------------------------------------------

    def _needed_blocks(self, request: Request, num_tokens: int) -> int:
        kv = self._kv
        if request.cache_state == NO_CACHE:
            return kv.blocks_for(num_tokens)
        return kv.blocks_to_hold(request, num_tokens)

    def _take_free(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """Give a request free blocks; False if they do not suffice."""
        if request.cache_state == SWAPPED_OUT or request in self.batch.lost:
            return False
        # A request on the GPU may take what is meant for others: it needs little.
        meant_for_others = terms.keep_free + (self.claimed_blocks if request.cache_state == NO_CACHE else 0)
        if self._needed_blocks(request, num_tokens) + meant_for_others > self._kv.num_free_gpu_blocks:
            return False
        self._extend(request, num_tokens)
        return True

    def _extend(self, request: Request, num_tokens: int) -> None:
        if request.cache_state != NO_CACHE:
            self._kv.extend(request, num_tokens)
            return
        self.changed.append(request)
        self._kv.extend(request, num_tokens)
        if self._kv.caches_prefixes and (request.num_computed_tokens or request.num_lost_tokens):
            self.reused.append(Reuse(request, request.num_computed_tokens, request.num_lost_tokens))
            request.num_lost_tokens = 0

    def _begin_swap_in(self, request: Request) -> None:
        self.swap_in.append(self._kv.begin_swap_in(request))

    def _begin_swap_out(self, victim: Request) -> bool:
        """Start to move a cache to host memory; False, and nothing done, if that is full."""
        try:
            self.swap_out.append(self._kv.begin_swap_out(victim))
        except OutOfBlocksError:
            return False
        self._lose(victim)
        return True

    def _drop(self, victim: Request) -> None:
        """Give up a cache. That makes room at once and needs none elsewhere, so it always works."""
        lost = self._kv.drop(victim)
        self.dropped.append(Drop(victim, lost, 0 if self._kv.caches_prefixes else lost))
        self._lose(victim)

    def _lose(self, victim: Request) -> None:
        self.batch.lose(victim)
        self.changed.append(victim)
