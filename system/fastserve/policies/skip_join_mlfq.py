"""Skip-join multi-level feedback queue: FastServe's policy (paper sections 4.1 and 4.2, Algorithm 1)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.policies.enst import EstimatedNextScheduledTime
from fastserve.policies.skip_join_options import SkipJoinMLFQOptions as SkipJoinMLFQOptions
from fastserve.scheduler import NeedOrder, Policy, register
from fastserve.scheduler.queue import MultiLevelQueue
from fastserve.scheduler.waiting import NEVER


@dataclass(slots=True)
class _PolicyState:
    """What a request has had of its quantum."""

    service_s: float = 0.0
    """Time served since it joined its queue."""


_EXACT = 1 - 1e-9
"""Times add up with rounding errors; a quantum of exactly four iterations must not last five."""


@mypyc_attr(allow_interpreted_subclasses=True)
class SkipJoinMLFQ(Policy):
    """Approximates least attained service when output lengths are unknown and prompt lengths are known.

    A new request joins the highest queue whose quantum covers its first iteration, so that a long prompt does not
    overrun the quanta of the queues above. A request that has used its quantum moves down to the next queue whose
    quantum covers its next iteration. A request that has waited `alpha_s` goes to the highest queue. Each iteration
    takes the first requests of the highest queues that are ready. Caches move by estimated next scheduled time.
    """

    name = "fastserve"
    Options = SkipJoinMLFQOptions
    needs_latency = True

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: SkipJoinMLFQOptions
    ) -> None:
        super().__init__(config, kv, latency, options, longest_wait_s=options.alpha_s)
        base = options.quantum_base_s or latency.iteration_time([], [1])
        self.quanta = [base * options.quantum_ratio**level for level in range(options.num_levels)]
        self._levels = MultiLevelQueue()
        self.queue = self._levels
        self._levels.fix_levels(len(self.quanta))
        self.enst = EstimatedNextScheduledTime(
            self._levels, self.quanta, config.num_places, options.alpha_s, front_first=options.enst_ties == "front"
        )
        self.max_passed_over = options.max_passed_over
        # Service at which a quantum is used up; that of the last level never is.
        self._used_up = [*(quantum * _EXACT for quantum in self.quanta[:-1]), math.inf]
        self._decode_times: list[float] = []
        """Seconds of an iteration that decodes one request, by its context in tokens."""
        self._promotion_resets_quantum = options.promotion_resets_quantum
        self._to_front = options.insertion == "front"
        self._check_every = options.starvation_check_every
        self._decisions_to_check = 1

    def need_order(self) -> NeedOrder:
        """By estimated next scheduled time."""
        return self.enst

    # -- queues ------------------------------------------------------------------------------------------------

    def level_for(self, iteration_time: float) -> int:
        """The highest level whose quantum is at least `iteration_time` seconds; the lowest if none is."""
        return min(bisect_left(self.quanta, iteration_time * _EXACT), len(self.quanta) - 1)

    def entry_level(self, request: Request) -> int:
        """Skip-join: the queue whose quantum covers the first iteration."""
        return self.level_for(self.next_iteration_time(request))

    def demotion_level(self, request: Request) -> int:
        """The next queue below whose quantum covers the next iteration."""
        below = request.level + 1
        next_time = self.next_iteration_time(request)
        return below if next_time * _EXACT <= self.quanta[below] else self.level_for(next_time)

    def next_iteration_time(self, request: Request) -> float:
        """Seconds the request's next iteration takes on its own: its prompt (or what was dropped), or one token."""
        num_tokens = request.num_tokens - request.num_computed_tokens
        if num_tokens == 1 and request.num_computed_tokens:
            return self._decode_time(request.num_tokens)
        return self.latency.iteration_time((num_tokens,), ())

    def _decode_time(self, context: int) -> float:
        times = self._decode_times
        if context >= len(times):
            for length in range(len(times), context + 64):
                times.append(self.latency.iteration_time((), (length,)))
        return times[context]

    def on_add(self, request: Request) -> None:
        """Join a queue."""
        request.policy_state = _PolicyState()
        self.queue.join(request, self.entry_level(request))

    def on_remove(self, request: Request) -> None:
        """Forget the request."""
        self.enst.restore(request)

    def on_start(self, request: Request, now: float) -> None:
        """Its deadline is again that of its place."""
        self.enst.restore(request)

    def on_preempt(self, request: Request, now: float) -> None:
        """Wait in the same place of the same queue, with a later deadline than the requests behind it."""
        state: _PolicyState = request.policy_state
        if request.wait_ends_s < NEVER and (state.service_s or self._to_front):
            self.enst.displace(request)

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Charge the iteration to the request's quantum; demote the request when that is used up."""
        state: _PolicyState = request.policy_state
        service_s = state.service_s + (end - start)
        if service_s < self._used_up[request.level]:
            state.service_s = service_s
        else:
            state.service_s = 0.0
            self._levels.move(request, self.demotion_level(request), front=self._to_front)

    # -- starvation --------------------------------------------------------------------------------------------

    def may_starve(self, request: Request) -> bool:
        """Promotion would do nothing for a request in the highest queue."""
        return request.level > 0

    def starved(self, now: float) -> Sequence[Request]:
        """The requests that have waited `alpha_s`, if it is time to check."""
        self._decisions_to_check -= 1
        if self._decisions_to_check:
            return ()
        self._decisions_to_check = self._check_every
        return self.overdue(now)

    def overdue(self, now: float) -> Sequence[Request]:
        """The requests that a check finds."""
        return self.waiting.due(now)

    def on_starved(self, request: Request, now: float) -> None:
        """Promote the request to the back of the highest queue, where its wait has no limit."""
        self.enst.restore(request)
        if self._promotion_resets_quantum:
            state: _PolicyState = request.policy_state
            state.service_s = 0.0
        self.queue.move(request, 0)

    # -- identical decisions -----------------------------------------------------------------------------------

    def steady_until(self, now: float, is_clear: bool) -> float:
        """When the first quantum is used up or the first wait ends; `now` if a request was left out."""
        if not is_clear:
            return now
        used_up = self._used_up
        left = min([used_up[request.level] - request.policy_state.service_s for request in self.running.values()])
        if self._check_every > 1 or not self.waiting:
            return now + left
        return min(now + left, self.waiting.first_end_s)

    def on_repeated(self, requests: Sequence[Request], times: np.ndarray) -> None:
        """Charge the requests, and count the decisions that were not made."""
        super().on_repeated(requests, times)
        every = self._check_every
        self._decisions_to_check = (self._decisions_to_check - (len(times) - 2) - 1) % every + 1

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """Until a quantum is used up or a wait is too long, if no request waits for room."""
        if not is_clear:
            return 1
        count = len(times) - 1
        if self._check_every > 1:
            if self.waiting.longest_wait_s is not None:
                count = min(count, self._decisions_to_check)
        elif self.waiting:
            # Iteration k is decided at times[k], and requests whose wait has ended by then are promoted first.
            count = min(count, max(1, int(np.searchsorted(times[:count], self.waiting.first_end_s, side="left"))))
        durations = np.diff(times[: count + 1])
        running = list(self.running.values())
        service = np.empty((len(running), count + 1))
        service[:, 0] = [request.policy_state.service_s for request in running]
        service[:, 1:] = durations
        used_up = np.array([self._used_up[request.level] for request in running])
        reached = (np.add.accumulate(service, axis=1)[:, 1:] >= used_up[:, None]).any(axis=0)
        return int(np.argmax(reached)) + 1 if reached.any() else count


register(SkipJoinMLFQ)
