"""Proactive swapping: caches move beside the computation, ahead of need (paper, section 4.2)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.core.request import RESIDENT, Request
from fastserve.kvcache import Location

if TYPE_CHECKING:
    from fastserve.scheduler.base import Scheduler
    from fastserve.scheduler.plan import IterationPlan
    from fastserve.scheduler.queue import ServiceOrder

SwapMode = Literal["proactive", "reactive", "recompute", "none"]
"""What happens when caches do not all fit the GPU.

`proactive`: they move to and from host memory beside the computation, ahead of need; the batch goes on without those
that are away. `reactive`: they move when the room or the cache is needed, the batch waiting for it. `recompute`: the
cache of the last in order is dropped when the room is needed. `none`: nobody loses its cache as long as anyone can run;
whoever finds no room waits.
"""

Reserve = Literal["history", "batch", "none"]


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Options of a policy that may have to take a request's cache off the GPU."""

    swap: SwapMode = "reactive"
    swap_budget_blocks: int = 64
    """Proactive: blocks that may be on their way in each direction before no further transfer starts."""
    reserve: Reserve = "history"
    """Proactive: blocks kept idle for arrivals. As many as the prompts of the last `reserve_window_s` took and one
    for each place in the batch (history), or those for the batch only (batch), or none."""
    reserve_window_s: float = 1.0
    """Proactive: how far back the history of arrivals is looked at, in seconds."""
    reserve_limit: float = 0.125
    """Proactive: share of the GPU's blocks that the reserve takes at most, so that it does not empty a small cache."""

    stay_tokens: int = 8
    """Proactive: tokens a request computes after its cache was brought in before it may have to give up a place in the
    batch for another's. A cache on its way costs two iterations of its room: much, where a batch fills memory."""

    def __post_init__(self) -> None:
        require_int("stay_tokens", self.stay_tokens, 0)
        require_int("swap_budget_blocks", self.swap_budget_blocks, 1)
        require_positive("reserve_window_s", self.reserve_window_s)
        if not 0 <= self.reserve_limit <= 1:
            raise ConfigError(f"reserve_limit must be a share from 0 to 1, got {self.reserve_limit!r}")


@dataclass(frozen=True, slots=True)
class PreemptiveOptions(MemoryOptions):
    """Options of a policy that preempts for the sake of the order, on FastServe's engine and with its swapping."""

    swap: SwapMode = "proactive"


class ProactiveSwapping:
    """Decides what moves beside an iteration.

    Two things start transfers. A request that is due (a place in the batch is its own, were its cache here) and away is
    brought in, and one without cache that finds no room is made some, in the order of service, from whoever will be
    needed last (`Scheduler.offloads`). Then, with what is left of the budget, the next ones to be needed are brought in
    ahead of time (`Scheduler.uploads`), exchanged for those needed later, and the reserve is filled up.

    Host memory full: whoever is not on the GPU waits, as in a system without preemption. A cache is dropped and
    recomputed only for the first of those that are due: if it has its cache here and must grow, or if all in its queue
    and above fit one batch (with more than that, requests would take turns in dropping each other's). Nothing is
    dropped to bring anyone in ahead of time.
    """

    def __init__(self, scheduler: Scheduler, options: MemoryOptions) -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv
        self._queue: ServiceOrder = scheduler.queue
        self._budget = options.swap_budget_blocks
        self._stay_tokens = options.stay_tokens
        self._window_s = options.reserve_window_s
        self._keeps_history = options.reserve == "history"
        limit = 0.0 if options.reserve == "none" else options.reserve_limit
        self.most_reserved = int(limit * self._kv.config.num_gpu_blocks)
        self._for_batch = min(scheduler.config.num_places, self.most_reserved)
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
        return min(self._for_batch + self._arrived_blocks, self.most_reserved)

    def idle_for(self, now: float, free_blocks: np.ndarray) -> int:
        """How many decisions in a row, with these blocks free at each, move nothing if nobody comes, goes or changes
        queues; at least 1, the one just made."""
        if self._version_without_victims == self._queue.version:
            return len(free_blocks)
        enough = free_blocks + self._kv.num_vacating_blocks >= self.reserve(now)
        return len(enough) if enough.all() else max(1, int(np.argmin(enough)))

    # -- those who are due -------------------------------------------------------------------------------------

    def make_room(self, plan: IterationPlan, request: Request, needed: int) -> None:
        """A request that is due and not away finds no room: make it some, most likely for a later iteration."""
        if not plan.short:
            self._victims = None
        room_comes = self._make_room(plan, request, needed, self.reserve(plan.now), is_first=not plan.stalled)
        if needed + plan.claimed_blocks <= self._kv.num_free_gpu_blocks:
            return  # Something was dropped, and the room is there already.
        plan.short.append(request)
        if room_comes:
            plan.claimed_blocks += needed
        # Only for as long as room is being cleared does it wait for a transfer.
        if self._kv.num_vacating_blocks:
            plan.stalled.append(request)

    def move(self, plan: IterationPlan) -> None:
        """Start what moves beside the iteration that has been planned."""
        all_served = not plan.short
        if self._queue.num_swapped_out:
            all_served = self._bring_in_due(plan) and all_served
        elif all_served and self._kv.num_free_gpu_blocks >= self.most_reserved:
            return
        self.move_ahead(plan, exchange=all_served)

    def _bring_in_due(self, plan: IterationPlan) -> bool:
        """Bring in those who would have a place in the batch if they were not away, as far as the budget goes.

        Returns whether all of them are on their way or have room coming.
        """
        kv = self._kv
        key = self._queue.key
        keys_of_batch, places = [key(request) for request in plan.batch], plan.batch_size - len(plan.stalled)
        num_before = 0
        self._victims = None
        starts = kv.num_arriving_blocks < self._budget or kv.num_vacating_blocks < self._budget
        for request in self._queue.swapped_out():
            key_of_request = key(request)
            while num_before < len(keys_of_batch) and keys_of_batch[num_before] < key_of_request:
                num_before += 1
            if num_before >= places:
                break
            places -= 1
            first = not plan.stalled
            plan.stalled.append(request)
            # Nobody overtakes one for whom nothing can be done now, and there is no use in more room than a budget.
            if starts and kv.location(request) is Location.HOST:
                starts = self.bring_in(plan, request, is_first=first) and plan.claimed_blocks < self._budget
        return starts

    def bring_in(self, plan: IterationPlan, request: Request, *, is_first: bool) -> bool:
        """Start to bring in a request that is due, or to make it room; False if the budget or the room is used up."""
        kv = self._kv
        needed = kv.blocks_for(request.num_tokens)
        reserve = self.reserve(plan.now)
        if self._start(plan, request, needed, reserve):
            return True
        room_comes = self._make_room(plan, request, needed, reserve, is_first=is_first)
        # Where no more room is coming the reserve has to give way.
        if not kv.num_vacating_blocks and self._start(plan, request, needed, 0):
            return True
        if room_comes:
            plan.claimed_blocks += needed
        return room_comes

    def _make_room(self, plan: IterationPlan, request: Request, needed: int, reserve: int, *, is_first: bool) -> bool:
        """Take cache from those behind the request that will be needed last, if that makes enough room at all.

        Returns whether the room is there or on its way.
        """
        kv = self._kv
        coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - plan.claimed_blocks
        wanted = needed + reserve
        if coming >= wanted:
            return True
        if kv.num_vacating_blocks >= self._budget:
            return False
        # Whoever runs needs little to go on, and gets it. A whole cache is worth another's only if they take no turns.
        may_drop = is_first and (
            request.cache_state == RESIDENT or self._queue.fits(request, self._scheduler.config.num_places)
        )
        # Nothing may leave. (By ENST, those found are passed over by whoever asks next: there the search is made.)
        if self._scheduler.moves_in_order and not (may_drop or kv.num_free_host_blocks):
            return coming >= needed
        victims, found = [], coming
        # One walk serves everybody: those who ask come in order, and who was no victim of the last is none of the next.
        self._victims = self._victims or self._scheduler.offloads(plan.now)
        queue, key = self._queue, self._queue.key(request)
        for victim in self._victims:
            if queue.key(victim) <= key:
                if self._scheduler.moves_in_order:
                    break
            elif self._may_leave(plan, victim):
                victims.append(victim)
                found += kv.num_blocks(victim)
                if found >= wanted:
                    break
        if found < wanted:
            # Last of all those who were given a place although they come behind; one at a time, so that the others
            # run meanwhile.
            for victim in reversed(plan.batch) if is_first and not kv.num_transfers else ():
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
            if not plan.evict(victim, or_drop=may_drop and coming < needed):
                break
            coming += blocks
        return coming >= needed

    # -- ahead of need -----------------------------------------------------------------------------------------

    def move_ahead(self, plan: IterationPlan, *, exchange: bool) -> None:
        """Fill the reserve, and before that, unless others still wait for the link, bring in who will be needed next,
        for idle blocks or in exchange for those needed later.

        Who that is is asked anew only when somebody has come, gone or changed queues.
        """
        kv = self._kv
        reserve = self.reserve(plan.now)
        version = self._queue.version
        if exchange and version != self._version_seen:
            self._version_seen = version
            # Whoever is away and not on the way.
            if self._queue.num_swapped_out > kv.num_transfers and kv.num_arriving_blocks < self._budget:
                self._exchange(plan, reserve)
        short = reserve + plan.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        may_leave = kv.num_vacating_blocks < self._budget and kv.num_free_host_blocks
        if short > 0 and version != self._version_without_victims and may_leave:
            for victim in self._scheduler.offloads(plan.now):
                if self._may_leave(plan, victim) and self._has_run(victim):
                    short -= kv.num_blocks(victim)
                    if not plan.evict(victim, or_drop=False) or short <= 0 or kv.num_vacating_blocks >= self._budget:
                        return
            self._version_without_victims = version

    def _exchange(self, plan: IterationPlan, reserve: int) -> None:
        kv = self._kv
        scheduler = self._scheduler
        now = plan.now
        offloads = None
        for request in scheduler.uploads(now):
            if kv.location(request) is not Location.HOST or request in plan.stalled:
                continue
            needed = kv.blocks_for(request.num_tokens)
            if self._start(plan, request, needed, reserve):
                continue
            coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - plan.claimed_blocks - reserve
            victims = []
            if coming < needed and kv.num_vacating_blocks < self._budget:
                urgency = scheduler.urgency(request, now)
                offloads = offloads or scheduler.offloads(now)
                for victim in offloads:
                    if scheduler.urgency(victim, now) <= urgency:
                        break
                    if self._may_leave(plan, victim) and self._has_run(victim):
                        victims.append(victim)
                        coming += kv.num_blocks(victim)
                        if coming >= needed:
                            break
                for victim in victims if coming >= needed else ():
                    if kv.num_vacating_blocks >= self._budget or not plan.evict(victim, or_drop=False):
                        return
            if coming < needed:
                return
            plan.claimed_blocks += needed
            if kv.num_arriving_blocks >= self._budget or kv.num_vacating_blocks >= self._budget:
                return

    def _start(self, plan: IterationPlan, request: Request, needed: int, reserve: int) -> bool:
        """Start to bring a request in, unless blocks are short or meant for others, or the budget is used up."""
        kv = self._kv
        free = kv.num_free_gpu_blocks
        # With the reserve it may never fit a small cache; if nothing else is on the GPU, nothing is worth waiting for.
        alone = free + kv.num_vacating_blocks == kv.config.num_gpu_blocks
        if kv.num_arriving_blocks >= self._budget or needed + plan.claimed_blocks + (0 if alone else reserve) > free:
            return False
        plan.swap_in(request)
        return True

    def _may_leave(self, plan: IterationPlan, victim: Request) -> bool:
        return not (victim.in_flight or plan.takes_part(victim))

    def _has_run(self, victim: Request) -> bool:
        """Whether it has run since it was last brought in: else its journey was for nothing, and may be so again."""
        return victim.num_computed_tokens != victim.num_tokens_at_swap_in
