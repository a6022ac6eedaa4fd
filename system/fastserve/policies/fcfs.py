"""FCFS on FastServe's engine: iteration-level batching in order of arrival (the paper's FastServe-FCFS)."""

from __future__ import annotations

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.scheduler import Batch, Policy, PolicyOptions, Terms, register
from fastserve.scheduler.batch import DEFAULT_TERMS

WATERMARK = 0.01
"""Share of the GPU's blocks that must stay free after an admission, so that the next token does not evict it again."""


@mypyc_attr(allow_interpreted_subclasses=True)
class ArrivalOrder(Policy):
    """Base of policies with one queue in order of arrival; a preempted request keeps its place in it."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        latency: LatencyModel,
        options: PolicyOptions,
        *,
        watermark: float = WATERMARK,
    ) -> None:
        super().__init__(config, kv, latency, options)
        self.watermark_blocks = int(watermark * kv.config.num_gpu_blocks)
        self.admission = Terms(may_evict=False, keep_free=self.watermark_blocks)
        """The terms on which a request starts while others run."""

    def on_add(self, request: Request) -> None:
        """Join at the back."""
        self.queue.join(request, 0)

    def is_first(self, batch: Batch) -> bool:
        """Whether no request runs, in the batch or in flight, that one offered next must leave room for."""
        return not batch.requests and self.is_idle

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """All of them: a request that waits for room still waits when the running ones take more of it."""
        return len(times) - 1


@mypyc_attr(allow_interpreted_subclasses=True)
class FCFS(ArrivalOrder):
    """Prompts and decode tokens share iterations; a request leaves the batch only when it ends or memory forces it."""

    name = "fastserve-fcfs"

    def terms(self, request: Request, batch: Batch) -> Terms:
        """A running request may take cache from later ones to grow, and the first always may; an admission may not."""
        if request.request_id in self.running or self.is_first(batch):
            return DEFAULT_TERMS
        return self.admission


register(FCFS)
