"""Skip-join multi-level feedback queue: FastServe's policy (paper section 4.1, Algorithm 1)."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastserve.config import require_int, require_positive
from fastserve.errors import ConfigError
from fastserve.request import Request
from fastserve.scheduler.base import MemoryOptions, Scheduler
from fastserve.scheduler.registry import register


@dataclass(frozen=True, slots=True)
class SkipJoinMLFQOptions(MemoryOptions):
    """What the paper sets, and what it leaves open."""

    quantum_base_s: float | None = None
    """Quantum of the highest queue in seconds; none takes the shortest iteration (one decode step of one request)."""
    quantum_ratio: float = 2.0
    """Quantum of each queue over that of the queue above it."""
    num_levels: int = 16
    """Queues. The paper states no number; 16 reach 32,768 base quanta, so the last one never binds."""
    alpha_s: float | None = 0.3
    """A request that has waited this many seconds goes to the highest queue; none never promotes."""

    def __post_init__(self) -> None:
        if self.quantum_base_s is not None:
            require_positive("quantum_base_s", self.quantum_base_s)
        if self.alpha_s is not None:
            require_positive("alpha_s", self.alpha_s)
        require_int("num_levels", self.num_levels, 1)
        require_positive("quantum_ratio", self.quantum_ratio)
        if self.quantum_ratio <= 1:
            raise ConfigError(f"quantum_ratio must be above 1, got {self.quantum_ratio!r}")


@dataclass(slots=True)
class _Standing:
    """A request's standing in its queue."""

    position: int = 0
    """Order of joining: smaller is nearer the front of its queue."""
    service_s: float = 0.0
    """Time served since it joined this queue."""
    deadline: float = 0.0
    """When its current wait ends in promotion (s); of no meaning while it runs."""


_EXACT = 1 - 1e-9
"""Times add up with rounding errors; a quantum of exactly four iterations must not last five."""


@register
class SkipJoinMLFQ(Scheduler):
    """Approximates least attained service when output lengths are unknown and prompt lengths are known.

    A new request joins the highest queue whose quantum covers its first iteration, so that a long prompt does not
    overrun the quanta of the queues above. One that has used its quantum moves down to the next queue whose quantum
    covers its next iteration. One that has waited `alpha_s` goes to the highest queue. Each iteration takes the first
    requests of the highest queues. Within a queue: first in, first out; whoever moves joins at the back.
    """

    name = "fastserve"
    Options = SkipJoinMLFQOptions
    needs_latency = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: SkipJoinMLFQOptions = self.options
        base = options.quantum_base_s or self.latency.iteration_time([], [1])
        self.quanta = [base * options.quantum_ratio**level for level in range(options.num_levels)]
        # Service at which a quantum is used up; that of the last level never is.
        self._used_up = [*(quantum * _EXACT for quantum in self.quanta[:-1]), math.inf]
        self._decode_time = functools.cache(lambda context: self.latency.iteration_time((), (context,)))
        self._alpha_s = options.alpha_s
        self.queues: list[OrderedDict[str, Request]] = [OrderedDict() for _ in self.quanta]
        self._num_joins = 0
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        """Whoever waits, in order of the deadline: every wait lasts alpha, so each new one is the last to end."""

    def in_order(self) -> Iterable[Request]:
        """Queue by queue, each front to back."""
        for queue in self.queues:
            if queue:
                yield from queue.values()

    def rank(self, request: Request) -> tuple[int, int]:
        """Level, then position in the queue."""
        return request.level, request.standing.position

    def level_for(self, iteration_time: float) -> int:
        """The highest level whose quantum is at least `iteration_time` seconds; the lowest if none is."""
        return min(bisect_left(self.quanta, iteration_time * _EXACT), len(self.quanta) - 1)

    def on_add(self, request: Request) -> None:
        """Skip-join: enter where the quantum covers the first iteration."""
        request.standing = _Standing()
        self._join(request, self.level_for(self._next_iteration_time(request)))
        self._start_waiting(request, request.arrival_s)

    def on_remove(self, request: Request) -> None:
        """Leave the queue."""
        del self.queues[request.level][request.request_id]
        self._waiting.pop(request.request_id, None)

    def on_start(self, request: Request, now: float) -> None:
        """It waits no longer."""
        self._waiting.pop(request.request_id, None)

    def on_preempt(self, request: Request, now: float) -> None:
        """It starts to wait, keeping its place in its queue."""
        self._start_waiting(request, now)

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Charge the iteration to the request's quantum; demote when that is used up."""
        standing = request.standing
        standing.service_s += end - start
        level = request.level
        if standing.service_s >= self._used_up[level]:
            del self.queues[level][request.request_id]
            next_time = self._next_iteration_time(request)
            covered = next_time * _EXACT <= self.quanta[level + 1]
            self._join(request, level + 1 if covered else self.level_for(next_time))

    def prepare(self, now: float) -> None:
        """Promote whoever has waited `alpha_s` to the highest queue."""
        due: list[Request] = []
        for request in self._waiting.values():
            if request.standing.deadline > now:
                break
            due.append(request)
        for request in due:
            # One that already stands in the highest queue must not lose its place there by being promoted again.
            if request.level > 0:
                del self.queues[request.level][request.request_id]
                self._join(request, 0)
            self._waiting.move_to_end(request.request_id)
            self._start_waiting(request, now)

    def _join(self, request: Request, level: int) -> None:
        request.level = level
        standing = request.standing
        standing.service_s = 0.0
        self._num_joins = standing.position = self._num_joins + 1
        self.queues[level][request.request_id] = request

    def _start_waiting(self, request: Request, since: float) -> None:
        if self._alpha_s is not None:
            request.standing.deadline = since + self._alpha_s
            self._waiting[request.request_id] = request

    def _next_iteration_time(self, request: Request) -> float:
        """Seconds the request's next iteration takes on its own: its prompt (or what was dropped), or one token."""
        num_tokens = request.num_tokens - request.num_computed_tokens
        if num_tokens == 1 and request.num_computed_tokens:
            return self._decode_time(request.num_tokens)
        return self.latency.iteration_time((num_tokens,), ())
