"""FCFS on FastServe's engine: iteration-level batching in order of arrival (the paper's FastServe-FCFS)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastserve.core.request import Request
from fastserve.scheduler.base import Scheduler
from fastserve.scheduler.plan import IterationPlan
from fastserve.scheduler.registry import register

WATERMARK = 0.01
"""Share of the GPU's blocks that must stay free after an admission, so that the next token does not evict it again."""


class ArrivalOrder(Scheduler):
    """Base of policies with one queue in order of arrival; a preempted request keeps its place in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watermark_blocks = int(WATERMARK * self.kv.config.num_gpu_blocks)

    def on_add(self, request: Request) -> None:
        """Join at the back."""
        self.queue.join(request, 0)

    def is_first(self, plan: IterationPlan) -> bool:
        """Whether nobody runs that whoever is offered next would have to leave room for."""
        return not plan.batch and self.is_idle

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """All of them: whoever waits for room waits on while those who run take more of it."""
        if self._swapping is not None and not self.is_clear:
            return 1
        return self.decisions_without_moves(times, free_blocks)


@register
class FCFS(ArrivalOrder):
    """Prompts and decode tokens share iterations; a request leaves the batch only when it ends or memory forces it."""

    name = "fastserve-fcfs"

    def offer(self, plan: IterationPlan, request: Request) -> bool:
        """A running request may take cache from later ones to grow, and the first always may; an admission may not."""
        if request.request_id in self.running or self.is_first(plan):
            return plan.offer(request)
        return plan.offer(request, may_evict=False, keep_free=self.watermark_blocks)
