"""Shortest remaining processing time: the bound that no policy without an oracle can be expected to reach."""

from __future__ import annotations

import math

from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.scheduler import Policy, PolicyOptions, PreemptiveOptions, register


@register
class SRPT(Policy):
    """The request with the least time to its end runs first, and preempts. Told output lengths, as no real system is.

    Optimal for mean completion time on one server with free preemption; here a batch shares the server and caches
    must move, so it is a strong reference rather than a proven bound.
    """

    name = "srpt"
    Options = PreemptiveOptions
    needs_latency = True
    needs_oracle = True
    max_passed_over = 16

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: PolicyOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        self._decode_time = latency.iteration_time((), (1,))

    def on_add(self, request: Request) -> None:
        """Join by the time to its end."""
        self.queue.join(request, self.remaining_iterations(request))

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Move a step nearer its end."""
        self.queue.move(request, self.remaining_iterations(request))

    def remaining_iterations(self, request: Request) -> int:
        """Time to its end on its own, in decode steps: a prompt (or what was dropped) counts as many as it takes."""
        steps = self.oracle(request)
        if not request.is_decoding:
            prompt_time = self.latency.iteration_time((request.num_tokens - request.num_computed_tokens,), ())
            steps += math.ceil(prompt_time / self._decode_time) - 1
        return steps
