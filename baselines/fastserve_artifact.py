"""What the FastServe authors' released code does, where it departs from their paper (artifact, commit 187a274)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastserve.core.config import SchedulerConfig
from fastserve.core.errors import ConfigError
from fastserve.core.request import SWAPPED_OUT, Request
from fastserve.kvcache import KVCacheManager, Location
from fastserve.latency import LatencyModel
from fastserve.policies.skip_join_mlfq import SkipJoinMLFQ, SkipJoinMLFQOptions
from fastserve.scheduler import NeedOrder, register
from fastserve.scheduler.batch import Terms
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
    admission_gate: float = 0.1
    """With swap=proactive: a request that has never run does not start while a smaller share of the host's blocks is
    free; 0: no gate."""
    wait_for_swaps: bool = False
    """With swap=proactive: whether the batch runs without requests whose caches are swapped out or moving, as under
    `fastserve`. The released engine's step never waits for a copy: a request runs at once, whatever its copy does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.admission_gate <= 1:
            raise ConfigError(f"admission_gate must be a share from 0 to 1, got {self.admission_gate!r}")

    @property
    def simulation_only_reason(self) -> str:
        """A real engine would compute with caches that are not there."""
        if self.wait_for_swaps or self.swap != "proactive":
            return ""
        return (
            "wait_for_swaps=false, as released, lets requests run before their caches have been copied, which gives "
            "wrong tokens on a real engine: for simulations only; set wait_for_swaps=true"
        )


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
            self._swap_out_tail(short)
            return
        quota = self._max_batch_size
        for request in self._need.swapped_out(self.now):
            if not quota:
                return
            if kv.location(request) is Location.HOST:
                quota -= 1
                if not self._start(request, kv.blocks_for(request.num_tokens), reserve):
                    return

    def _swap_out_tail(self, num_blocks: int, *, behind: Request | None = None) -> None:
        """Swap out the last requests of the order until so many blocks are freed; only those behind a request."""
        for victim in self._need.victims(self.now):
            if behind is not None and not self._queue.is_before(behind, victim):
                return
            if self._may_leave(victim):
                num_blocks -= self._kv.num_blocks(victim)
                if not self.evict(victim, or_drop=False) or num_blocks <= 0:
                    return

    def _may_leave(self, victim: Request) -> bool:
        """A request that is due and found no room may be swapped out, too: all that run are in the batch."""
        return not (victim.in_flight or victim in self.batch.requests or victim in self.batch.lost)


class MoveAtOnce(MoveTail):
    """The same where no step waits for a copy: a cache counts as moved when its copy starts.

    So the order alone gives places. A request is swapped in and runs at once, in room of requests at the tail that were
    swapped out by the same decision. The copies take their time on the link, and nothing depends on it.
    """

    offers_swapped_out = True

    def find_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """Get the request onto the GPU. Whatever it lacks, reserve included, the requests at the tail give up."""
        kv = self._kv
        if request in self.batch.lost:
            return False
        needed = kv.blocks_to_hold(request, num_tokens)
        short = needed + self.reserve(self.now) - kv.num_free_gpu_blocks
        if short > 0:
            self._swap_out_tail(short, behind=request)
        if needed > kv.num_free_gpu_blocks:
            return False
        if request.cache_state == SWAPPED_OUT:
            self._begin_swap_in(request)
        else:
            self._extend(request, num_tokens)
        return True

    def move(self) -> None:
        """Beside the batch the reserve is filled, or the front of the order swapped in."""
        self.move_ahead(exchange=True)

    def _begin_swap_in(self, request: Request) -> None:
        super()._begin_swap_in(request)
        self._kv.complete(self.swap_in[-1])
        self.changed.append(request)

    def _begin_swap_out(self, victim: Request) -> bool:
        if not super()._begin_swap_out(victim):
            return False
        self._kv.complete(self.swap_out[-1])
        return True


@register
class FastServeArtifact(SkipJoinMLFQ):
    """FastServe as released: skip-join made inert by the shipped profile, no ENST, no history, rare promotion.

    A request is demoted by exactly one queue when it has used more than its quantum. A request that has never run
    counts as starved at every check.
    """

    name = "fastserve-artifact"
    Options = ArtifactOptions
    options: ArtifactOptions

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: ArtifactOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        self._decisions_to_check = options.starvation_check_every
        self._is_gate_closed = False
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

    def prepare(self, now: float) -> None:
        """Look at the gate, once for all requests of a decision."""
        if self.swap == "proactive":
            least = self.options.admission_gate * self.kv.config.num_host_blocks
            self._is_gate_closed = self.kv.num_free_host_blocks < least

    def admits(self, request: Request) -> bool:
        """Every request while the gate is open; then only requests that have run and lost their cache."""
        return not self._is_gate_closed or request.num_output_tokens > 0

    def mover_class(self) -> type[MoveAhead]:
        """The tail moves, with or without waiting for its copies."""
        return MoveTail if self.options.wait_for_swaps else MoveAtOnce

    def need_order(self) -> NeedOrder:
        """In the order of service."""
        return InServiceOrder(self.queue)
