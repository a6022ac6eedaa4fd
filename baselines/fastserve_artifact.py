"""What the FastServe authors' released code does, where it departs from their paper (artifact, commit 187a274)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager, Location
from fastserve.latency import LatencyModel
from fastserve.policies.skip_join_mlfq import SkipJoinMLFQ, SkipJoinMLFQOptions
from fastserve.scheduler import NeedOrder, register
from fastserve.scheduler.moving import MoveAhead
from fastserve.scheduler.need import InServiceOrder
from fastserve.scheduler.options import Reserve


@dataclass(frozen=True)
class ArtifactOptions(SkipJoinMLFQOptions):
    """The released defaults."""

    quantum_base_s: float | None = 0.010
    """Quantum of the highest queue in seconds."""
    alpha_s: float | None = 3.0
    """A request that has waited this many seconds goes to the highest queue at the next check; none never promotes."""
    starvation_check_every: int = 1000
    """Decisions from one check to the next."""
    insertion: Literal["back", "front"] = "front"
    """End of its queue that an unfinished request returns to; a new request joins at the back."""
    reserve: Reserve = "batch"
    """A block for each place in the batch."""
    max_passed_over: int = 0
    """The scan stops at the first request beyond the token budget."""
    first_iteration: Literal["shipped", "profiled"] = "shipped"
    """The shipped profile says that every first iteration is shorter than the first quantum, at any length, so that
    every request joins the highest queue and skip-join does nothing; `profiled` takes true times instead."""


class MoveTail(MoveAhead):
    """No estimate of need: the tail of the lowest queue is swapped out, the front of the highest swapped in."""

    def bring_in(self, request: Request, *, is_first: bool) -> bool:
        """A request that is due waits its turn."""
        return False

    def make_room(self, request: Request, needed: int) -> None:
        """The request waits until enough is free."""
        self.short.append(request)
        self.claimed_blocks = max(self.claimed_blocks, needed)

    def move_ahead(self, *, exchange: bool) -> None:
        """Swap out until the reserve, and room for requests that found none, is free; or else swap in up to a batch."""
        kv = self._kv
        reserve = self.reserve(self.now)
        short = reserve + self.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if short > 0:
            for victim in self._need.victims(self.now):
                if self._may_leave(victim):
                    blocks = kv.num_blocks(victim)
                    if not self.evict(victim, or_drop=False):
                        return
                    short -= blocks
                    if short <= 0:
                        return
            return
        quota = self._max_batch_size
        for request in self._need.swapped_out(self.now):
            if not quota:
                return
            if kv.location(request) is Location.HOST:
                quota -= 1
                if not self._start(request, kv.blocks_for(request.num_tokens), reserve):
                    return


@register
class FastServeArtifact(SkipJoinMLFQ):
    """FastServe as released: skip-join made inert by the shipped profile, no ENST, no history, rare promotion.

    A request is demoted by exactly one queue when it has used more than its quantum. A request that has never run
    counts as starved at every check.
    """

    name = "fastserve-artifact"
    Options = ArtifactOptions
    Mover = MoveTail
    options: ArtifactOptions

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: ArtifactOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        self._decisions_to_check = options.starvation_check_every
        # More than the quantum, not all of it.
        self._used_up = [*(quantum * (1 + 1e-9) for quantum in self.quanta[:-1]), math.inf]

    def entry_level(self, request: Request) -> int:
        """The highest queue, or, with a true profile, the one whose quantum covers the first iteration."""
        return 0 if self.options.first_iteration == "shipped" else super().entry_level(request)

    def demotion_level(self, request: Request) -> int:
        """The next queue below."""
        return request.level + 1

    def overdue(self, now: float) -> Sequence[Request]:
        """Requests that have waited `alpha_s`, and requests that have never run."""
        return [r for r in self.waiting if r.wait_ends_s <= now or not r.num_output_tokens]

    def need_order(self) -> NeedOrder:
        """In the order of service."""
        return InServiceOrder(self.queue)
