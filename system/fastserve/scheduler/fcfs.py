"""FCFS on FastServe's engine: iteration-level batching in order of arrival (the paper's FastServe-FCFS)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from fastserve.request import Request
from fastserve.scheduler.base import MemoryOptions, Scheduler
from fastserve.scheduler.plan import IterationPlan
from fastserve.scheduler.registry import register

WATERMARK = 0.01
"""Share of the GPU's blocks that must stay free after an admission, so that the next token does not evict it again."""


class ArrivalOrder(Scheduler):
    """Base of policies that keep requests in the order they arrived, a preempted one at its old place."""

    Options = MemoryOptions
    head_of_line = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue: OrderedDict[str, Request] = OrderedDict()
        self._num_added = 0
        self.watermark_blocks = int(WATERMARK * self.kv.config.num_gpu_blocks)

    def in_order(self) -> Iterable[Request]:
        """By arrival."""
        return self._queue.values()

    def rank(self, request: Request) -> int:
        """Position in the order of arrival."""
        return request.standing

    def on_add(self, request: Request) -> None:
        """Append."""
        self._queue[request.request_id] = request
        request.standing = self._num_added
        self._num_added += 1

    def on_remove(self, request: Request) -> None:
        """Forget."""
        del self._queue[request.request_id]


@register
class FCFS(ArrivalOrder):
    """Prompts and decode tokens share iterations; a request leaves the batch only when it ends or memory forces it."""

    name = "fastserve-fcfs"

    def offer(self, plan: IterationPlan, request: Request) -> bool:
        """A running request may take cache from later ones to grow, and the first always may; an admission may not."""
        if plan.is_empty or request.request_id in self.running:
            return plan.offer(request)
        return plan.offer(request, may_evict=False, keep_free=self.watermark_blocks)
