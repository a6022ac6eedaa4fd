"""Shortest remaining processing time: the bound that no policy without an oracle can be expected to reach."""

from __future__ import annotations

import math
from typing import Any

from fastserve.core.request import Request
from fastserve.scheduler import PreemptiveOptions, Scheduler, register


@register
class SRPT(Scheduler):
    """Whoever needs the least time to finish runs first, and preempts. Told the output length, as no real system is.

    Optimal for mean completion time on one server with free preemption; here a batch shares the server and caches
    must move, so it is a strong reference rather than a proven bound.
    """

    name = "srpt"
    Options = PreemptiveOptions
    needs_latency = True
    needs_oracle = True
    max_passed_over = 16

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decode_time = self.latency.iteration_time((), (1,))

    def on_add(self, request: Request) -> None:
        """Join by the time it takes from start to end."""
        self.queue.join(request, self.remaining_iterations(request))

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """A step nearer its end."""
        self.queue.move(request, self.remaining_iterations(request))

    def remaining_iterations(self, request: Request) -> int:
        """Time to its end on its own, in decode steps: a prompt (or what was dropped) counts as many as it takes."""
        steps = self.oracle(request)
        if not request.is_decoding:
            prompt_time = self.latency.iteration_time((request.num_tokens - request.num_computed_tokens,), ())
            steps += math.ceil(prompt_time / self._decode_time) - 1
        return steps
