"""Proactive swapping: caches move beside the computation, ahead of need (paper, section 4.2)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastserve.config import require_int, require_positive
from fastserve.kvcache import Location
from fastserve.request import Request

if TYPE_CHECKING:
    from fastserve.scheduler.base import Scheduler
    from fastserve.scheduler.plan import IterationPlan

SwapMode = Literal["proactive", "reactive", "recompute", "none"]
"""What happens when caches do not all fit the GPU.

`proactive`: they move to and from host memory beside the computation, ahead of need; the batch goes on without those
that are away. `reactive`: they move when the room or the cache is needed, the batch waiting for it. `recompute`: the
cache of the last in order is dropped when the room is needed. `none`: nobody loses its cache, whoever finds no room
waits.
"""

Reserve = Literal["history", "batch", "none"]

MOST_RESERVED = 1 / 8
"""Share of the GPU's blocks that the reserve may take at most, so that it does not empty a small cache."""


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

    def __post_init__(self) -> None:
        require_int("swap_budget_blocks", self.swap_budget_blocks, 1)
        require_positive("reserve_window_s", self.reserve_window_s)


class ProactiveSwapping:
    """Decides what moves beside an iteration.

    Two things start transfers. A request that is due (a place in the batch is its own, were its cache here) and away is
    brought in, and one without cache that finds no room is made some, in the order of service, from whoever will be
    needed last (`Scheduler.offloads`). Then, with what is left of the budget, the next ones to be needed are brought in
    ahead of time (`Scheduler.uploads`), exchanged for those needed later, and the reserve is filled up.

    Host memory full: a cache is dropped and recomputed, but only for the first of those that are due, and never to
    bring anyone in ahead of time.
    """

    def __init__(self, scheduler: Scheduler, options: MemoryOptions) -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv
        self._queue = scheduler.queue
        self._budget = options.swap_budget_blocks
        self._window_s = options.reserve_window_s
        self._keeps_history = options.reserve == "history"
        self.most_reserved = int(MOST_RESERVED * self._kv.config.num_gpu_blocks) if options.reserve != "none" else 0
        self._for_batch = min(scheduler.config.max_batch_size, self.most_reserved)
        self._arrivals: deque[tuple[float, int]] = deque()
        self._arrived_blocks = 0

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

    def is_idle(self) -> bool:
        """Whether nobody is away and the reserve is full whatever its size, so that there is nothing to decide."""
        return not self._queue.num_away and self._kv.num_free_gpu_blocks >= self.most_reserved

    def idle_for(self, free_blocks: np.ndarray) -> int:
        """How many decisions in a row leave it idle, given the blocks free at each; at least 1."""
        return max(1, int(np.argmax(free_blocks < self.most_reserved)) or len(free_blocks)) if self.is_idle() else 1

    # -- those who are due -------------------------------------------------------------------------------------

    def bring_in(self, plan: IterationPlan, request: Request) -> None:
        """A request that is due is away: note that it waits, and start to bring it in as far as the budget goes."""
        first = not plan.stalled
        plan.stalled.append(request)
        kv = self._kv
        if kv.location(request) is not Location.HOST:
            return
        needed = kv.blocks_to_hold(request, request.num_tokens)
        if self._start(plan, request, needed, self.reserve(plan.now)):
            return
        room_comes = self._make_room(plan, request, needed, may_drop=first)
        # Where no more room is coming the reserve has to give way.
        if not kv.num_vacating_blocks and self._start(plan, request, needed, 0):
            return
        if room_comes:
            plan.claimed_blocks += needed

    def make_room(self, plan: IterationPlan, request: Request, needed: int) -> None:
        """A request that is due and not away finds no room: make it some, most likely for a later iteration."""
        room_comes = self._make_room(plan, request, needed, may_drop=not plan.stalled)
        if needed + plan.claimed_blocks <= self._kv.num_free_gpu_blocks:
            return  # Something was dropped, and the room is there already.
        plan.short.append(request)
        if room_comes:
            plan.claimed_blocks += needed
        # Only for as long as room is being cleared does it wait for a transfer.
        if self._kv.num_vacating_blocks:
            plan.stalled.append(request)

    def _make_room(self, plan: IterationPlan, request: Request, needed: int, *, may_drop: bool) -> bool:
        """Take cache from those behind the request that will be needed last, if that makes enough room at all.

        Returns whether the room is there or on its way.
        """
        kv = self._kv
        coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - plan.claimed_blocks
        wanted = needed + self.reserve(plan.now)
        if coming >= wanted:
            return True
        if kv.num_vacating_blocks >= self._budget:
            return False
        rank = (request.level, request.position)
        victims, found = [], coming
        for victim in self._scheduler.offloads(plan.now):
            if (victim.level, victim.position) > rank and self._may_leave(plan, victim):
                victims.append(victim)
                found += kv.num_blocks(victim)
                if found >= wanted:
                    break
        if found < needed:
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

    def prefetch(self, plan: IterationPlan) -> None:
        """Bring in who will be needed next, for idle blocks or in exchange for those needed later; fill the reserve."""
        kv = self._kv
        if self.is_idle():
            return
        reserve = self.reserve(plan.now)
        scheduler = self._scheduler
        now = plan.now
        offloads = None
        if self._queue.num_away and kv.num_arriving_blocks < self._budget:
            for request in scheduler.uploads(now):
                if kv.location(request) is not Location.HOST or request in plan.stalled:
                    continue
                needed = kv.blocks_to_hold(request, request.num_tokens)
                if self._start(plan, request, needed, reserve):
                    continue
                coming = kv.num_free_gpu_blocks + kv.num_vacating_blocks - plan.claimed_blocks - reserve
                urgency = scheduler.urgency(request, now)
                victims = []
                if coming < needed and kv.num_vacating_blocks < self._budget:
                    offloads = offloads or scheduler.offloads(now)
                    for victim in offloads:
                        if scheduler.urgency(victim, now) <= urgency:
                            break
                        if self._may_leave(plan, victim) and self._has_run(victim):
                            victims.append(victim)
                            coming += kv.num_blocks(victim)
                            if coming >= needed:
                                break
                    if coming >= needed and not all(plan.evict(victim, or_drop=False) for victim in victims):
                        break
                if coming < needed:
                    break
                plan.claimed_blocks += needed
                if kv.num_arriving_blocks >= self._budget or kv.num_vacating_blocks >= self._budget:
                    break
        short = reserve + plan.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if short > 0 and kv.num_vacating_blocks < self._budget:
            for victim in scheduler.offloads(now):
                if self._may_leave(plan, victim) and self._has_run(victim):
                    short -= kv.num_blocks(victim)
                    if not plan.evict(victim, or_drop=False) or short <= 0 or kv.num_vacating_blocks >= self._budget:
                        break

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
