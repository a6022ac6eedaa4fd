"""Orca: iteration-level scheduling, first come, first served (Yu et al., OSDI'22)."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.checks import require_int
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.policies.fcfs import ArrivalOrder
from fastserve.scheduler import Batch, PolicyOptions, Terms, register
from fastserve.scheduler.batch import DEFAULT_TERMS


@dataclass(frozen=True)
class ReservingOptions(PolicyOptions):
    """Options of a policy that reserves cache at admission."""

    max_seq_len: int = 2048
    """Prompt and output that cache is reserved for, unless the request declares less: OPT's context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("max_seq_len", self.max_seq_len, 2)


class ReservingOrder(ArrivalOrder):
    """Base of policies without paging: a request gets cache for its longest possible length when it starts.

    A request that outgrows its reservation (it declared more than `max_seq_len`) grows block by block, and if there is
    no room the last to arrive is recomputed.
    """

    Options = ReservingOptions
    options: ReservingOptions

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: ReservingOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        # An admitted request has all it will need, so no room must be left for growth.
        self.watermark_blocks = 0

    def tokens_to_hold(self, request: Request) -> int:
        """Tokens of cache to reserve: prompt and longest output, as far as the pool goes."""
        declared = request.num_prompt_tokens + request.max_output_tokens
        pool = self.kv.config.num_gpu_blocks * self.kv.block_size
        return max(request.num_tokens, min(declared, self.options.max_seq_len, pool))

    def terms(self, request: Request, batch: Batch) -> Terms:
        """A request that starts needs its whole reservation, and only the first may take others' caches."""
        if request.request_id in self.running:
            return DEFAULT_TERMS
        return Terms(may_evict=self.is_first(batch), hold_tokens=self.tokens_to_hold(request))


@register
class Orca(ReservingOrder):
    """Requests join and leave the batch at every iteration, in order of arrival, with cache reserved for the longest.

    No request waits for another's end, but the reservations leave room for few at once.
    """

    name = "orca"
