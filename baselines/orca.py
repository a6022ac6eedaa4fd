"""Orca: iteration-level scheduling, first come, first served (Yu et al., OSDI'22)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.request import Request
from fastserve.policies.fcfs import ArrivalOrder
from fastserve.scheduler import register
from fastserve.scheduler.plan import IterationPlan


@dataclass(frozen=True, slots=True)
class ReservingOptions:
    """Options of a policy that reserves cache at admission."""

    max_seq_len: int = 2048
    """Prompt and output that cache is reserved for, unless the request declares less: OPT's context length."""

    def __post_init__(self) -> None:
        require_int("max_seq_len", self.max_seq_len, 2)


class ReservingOrder(ArrivalOrder):
    """Base of policies without paging: a request gets cache for its longest possible length when it starts.

    One that outgrows the reservation (it declared more than `max_seq_len`) grows block by block, and if there is no
    room the last to arrive is recomputed.
    """

    Options = ReservingOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Whoever is admitted has all it will need, so no room must be left for growth.
        self.watermark_blocks = 0

    def tokens_to_hold(self, request: Request) -> int:
        """Tokens of cache to reserve: prompt and longest output, as far as the pool goes."""
        declared = request.num_prompt_tokens + request.max_output_tokens
        pool = self.kv.config.num_gpu_blocks * self.kv.block_size
        return max(request.num_tokens, min(declared, self.options.max_seq_len, pool))

    def offer(self, plan: IterationPlan, request: Request) -> bool:
        """Who runs goes on; who starts needs its whole reservation, and only the first may take others' cache."""
        if request.request_id in self.running:
            return plan.offer(request)
        return plan.offer(request, hold_tokens=self.tokens_to_hold(request), may_evict=self.is_first(plan))


@register
class Orca(ReservingOrder):
    """Requests join and leave the batch at every iteration, in order of arrival, with cache reserved for the longest.

    No request waits for another's end, but the reservations leave room for few at once.
    """

    name = "orca"
