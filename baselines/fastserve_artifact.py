"""What the FastServe authors' released code does, where it departs from their paper (artifact, commit 187a274)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastserve.core.request import Request
from fastserve.kvcache import Location
from fastserve.policies.skip_join_mlfq import SkipJoinMLFQ, SkipJoinMLFQOptions
from fastserve.scheduler import Scheduler, register
from fastserve.scheduler.plan import IterationPlan
from fastserve.scheduler.swapping import ProactiveSwapping, Reserve


@dataclass(frozen=True, slots=True)
class ArtifactOptions(SkipJoinMLFQOptions):
    """The released defaults."""

    quantum_base_s: float | None = 0.010
    """Quantum of the highest queue in seconds."""
    alpha_s: float | None = 3.0
    """A request that has waited this many seconds goes to the highest queue at the next check; none never promotes."""
    starvation_check_every: int = 1000
    """Decisions from one check to the next."""
    insertion: Literal["back", "front"] = "front"
    """Where an unfinished request goes back to; a new one goes to the back."""
    reserve: Reserve = "batch"
    """A block for each place in the batch."""
    max_passed_over: int = 0
    """The scan stops at the first request beyond the token budget."""
    first_iteration: Literal["shipped", "profiled"] = "shipped"
    """The shipped profile says that every first iteration is shorter than the first quantum, at any length, so that
    every request joins the highest queue and skip-join does nothing; `profiled` takes true times instead."""


class TailSwapping(ProactiveSwapping):
    """No estimate of who is needed when: out goes the tail of the lowest queue, in comes the front of the highest."""

    def bring_in(self, plan: IterationPlan, request: Request, *, is_first: bool) -> bool:
        """Being due changes nothing: it waits its turn."""
        return False

    def make_room(self, plan: IterationPlan, request: Request, needed: int) -> None:
        """It waits until enough is free."""
        plan.short.append(request)
        plan.claimed_blocks = max(plan.claimed_blocks, needed)

    def move_ahead(self, plan: IterationPlan, *, exchange: bool) -> None:
        """Out, until the reserve (and room for whoever found none) is free; or else in, up to a batch at once."""
        kv, scheduler = self._kv, self._scheduler
        reserve = self.reserve(plan.now)
        short = reserve + plan.claimed_blocks - kv.num_free_gpu_blocks - kv.num_vacating_blocks
        if short > 0:
            for victim in scheduler.offloads(plan.now):
                if self._may_leave(plan, victim):
                    blocks = kv.num_blocks(victim)
                    if not plan.evict(victim, or_drop=False):
                        return
                    short -= blocks
                    if short <= 0:
                        return
            return
        quota = scheduler.config.max_batch_size
        for request in scheduler.uploads(plan.now):
            if not quota:
                return
            if kv.location(request) is Location.HOST:
                quota -= 1
                if not self._start(plan, request, kv.blocks_for(request.num_tokens), reserve):
                    return


@register
class FastServeArtifact(SkipJoinMLFQ):
    """FastServe as released: skip-join made inert by the shipped profile, no ENST, no history, rare promotion.

    A request is demoted by exactly one queue when it has used more than its quantum. One that has never run counts as
    starved at every check.
    """

    name = "fastserve-artifact"
    Options = ArtifactOptions
    Swapping = TailSwapping

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decisions_to_check = self.options.starvation_check_every
        # More than the quantum, not all of it.
        self._used_up = [*(quantum * (1 + 1e-9) for quantum in self.quanta[:-1]), math.inf]

    def entry_level(self, request: Request) -> int:
        """The highest queue, or, with a true profile, the one whose quantum covers the first iteration."""
        return 0 if self.options.first_iteration == "shipped" else super().entry_level(request)

    def demotion_level(self, request: Request) -> int:
        """One below."""
        return request.level + 1

    def promote_starved(self, now: float) -> None:
        """Whoever has waited long, and whoever has never run."""
        for request in list(self._waiting):
            if request.policy_state.deadline <= now or not request.num_output_tokens:
                self.promote(request)

    def uploads(self, now: float) -> Iterator[Request]:
        """In order."""
        return Scheduler.uploads(self, now)

    def offloads(self, now: float) -> Iterator[Request]:
        """Last in order first."""
        return Scheduler.offloads(self, now)

    def urgency(self, request: Request, now: float) -> tuple[float, ...]:
        """The order."""
        return Scheduler.urgency(self, request, now)
