"""Skip-join multi-level feedback queue: FastServe's policy (paper sections 4.1 and 4.2, Algorithm 1)."""

from __future__ import annotations

import functools
import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.core.request import RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.scheduler.base import Scheduler
from fastserve.scheduler.iteration import Iteration
from fastserve.scheduler.registry import register
from fastserve.scheduler.swapping import MemoryOptions, PreemptiveOptions
from fastserve.scheduler.waiting import WaitList


@dataclass(frozen=True, slots=True)
class SkipJoinMLFQOptions(PreemptiveOptions):
    """What the paper sets, and what it leaves open."""

    quantum_base_s: float | None = None
    """Quantum of the highest queue in seconds; none takes the shortest iteration (one decode step of one request)."""
    quantum_ratio: float = 2.0
    """Quantum of each queue over that of the queue above it."""
    num_levels: int = 16
    """Queues. The paper states no number; 16 reach 32,768 base quanta, so the last one never binds."""
    alpha_s: float | None = 0.3
    """A request that has waited this many seconds goes to the highest queue; none never promotes."""
    starvation_check_every: int = 1
    """Decisions from one look at who has waited `alpha_s` to the next. The paper states no period."""
    insertion: Literal["back", "front"] = "back"
    """Where in its new queue a demoted request goes. The paper does not say; the back is fair among equals."""
    promotion_resets_quantum: bool = True
    """Whether a promoted request starts a quantum anew, or keeps what it has used since it last changed queues."""
    enst_ties: Literal["front", "back"] = "front"
    """Who of a queue, where T_execute is the same for all, is taken to be scheduled next. The paper does not say; the
    batch is taken from the front."""
    max_passed_over: int = 16
    """Prompts beyond the token budget that a decision passes over before it tries no more of them; bounds its cost."""

    def __post_init__(self) -> None:
        # Not super(): the class that slots=True makes is not the one this body was written in.
        MemoryOptions.__post_init__(self)
        if self.quantum_base_s is not None:
            require_positive("quantum_base_s", self.quantum_base_s)
        if self.alpha_s is not None:
            require_positive("alpha_s", self.alpha_s)
        require_int("num_levels", self.num_levels, 1)
        require_int("starvation_check_every", self.starvation_check_every, 1)
        require_int("max_passed_over", self.max_passed_over, 0)
        require_positive("quantum_ratio", self.quantum_ratio)
        if self.quantum_ratio <= 1:
            raise ConfigError(f"quantum_ratio must be above 1, got {self.quantum_ratio!r}")


@dataclass(slots=True)
class _PolicyState:
    """What a request has had and is owed."""

    service_s: float = 0.0
    """Time served since it joined its queue."""
    deadline: float = math.inf
    """When its current wait ends in promotion (s); infinite while it runs and in the highest queue."""
    ended_s: float = 0.0
    """When its last iteration ended."""
    is_displaced: bool = False
    """Whether it was preempted within its quantum: it waits at its place with a later deadline than those behind."""


_EXACT = 1 - 1e-9
"""Times add up with rounding errors; a quantum of exactly four iterations must not last five."""


@register
class SkipJoinMLFQ(Scheduler):
    """Approximates least attained service when output lengths are unknown and prompt lengths are known.

    A new request joins the highest queue whose quantum covers its first iteration, so that a long prompt does not
    overrun the quanta of the queues above. One that has used its quantum moves down to the next queue whose quantum
    covers its next iteration. One that has waited `alpha_s` goes to the highest queue. Each iteration takes the first
    requests of the highest queues that are ready. Caches move in order of the estimated next scheduled time.
    """

    name = "fastserve"
    Options = SkipJoinMLFQOptions
    needs_latency = True
    moves_in_order = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: SkipJoinMLFQOptions = self.options
        base = options.quantum_base_s or self.latency.iteration_time([], [1])
        self.quanta = [base * options.quantum_ratio**level for level in range(options.num_levels)]
        self.queue.fix_levels(len(self.quanta))
        self.max_passed_over = options.max_passed_over
        # Service at which a quantum is used up; that of the last level never is.
        self._used_up = [*(quantum * _EXACT for quantum in self.quanta[:-1]), math.inf]
        self._decode_time = functools.cache(lambda context: self.latency.iteration_time((), (context,)))
        self._longest_wait_s = math.inf if options.alpha_s is None else options.alpha_s
        self._promotion_resets_quantum = options.promotion_resets_quantum
        self._tie_sign = 1 if options.enst_ties == "front" else -1
        self._to_front = options.insertion == "front"
        self._decisions_to_check = 1
        self._waits: list[float] = []
        self._waits_version = -1
        self._waiting = WaitList(options.alpha_s)
        """Whoever waits below the highest queue, to be promoted after alpha."""
        self._displaced: list[dict[str, Request]] = [{} for _ in self.quanta]
        """Those of each queue; all others in it have their deadlines in the order of their places."""

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

    def on_add(self, request: Request) -> None:
        """Join a queue and start to wait."""
        request.policy_state = _PolicyState()
        self.queue.join(request, self.entry_level(request))
        # Promotion would do nothing for one that is in the highest queue already.
        if request.level:
            self._waiting.start(request, request.arrival_s)

    def on_remove(self, request: Request) -> None:
        """Wait no longer."""
        self._end_wait(request)

    def on_start(self, request: Request, now: float) -> None:
        """Wait no longer."""
        self._end_wait(request)

    def on_preempt(self, request: Request, now: float) -> None:
        """Start to wait, in the same place of the same queue."""
        policy_state = request.policy_state
        if request.level:
            self._waiting.start_preempted(request, now)
        if policy_state.deadline < math.inf and (policy_state.service_s or self._to_front):
            policy_state.is_displaced = True
            self._displaced[request.level][request.request_id] = request

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Charge the iteration to the request's quantum; demote when that is used up."""
        policy_state = request.policy_state
        policy_state.ended_s = end
        service_s = policy_state.service_s + (end - start)
        if service_s < self._used_up[request.level]:
            policy_state.service_s = service_s
        else:
            policy_state.service_s = 0.0
            self.queue.move(request, self.demotion_level(request), front=self._to_front)

    def prepare(self, now: float) -> None:
        """Look who has waited too long, if it is time to."""
        self._waiting.decide(now)
        self._decisions_to_check -= 1
        if not self._decisions_to_check:
            self._decisions_to_check = self.options.starvation_check_every
            self.promote_starved(now)

    def promote_starved(self, now: float) -> None:
        """Move whoever has waited `alpha_s` to the back of the highest queue."""
        for request in self._waiting.due(now):
            self.promote(request)

    def promote(self, request: Request) -> None:
        """Move a waiting request to the back of the highest queue, where its wait has no deadline."""
        self._end_wait(request)
        if self._promotion_resets_quantum:
            request.policy_state.service_s = 0.0
        self.queue.move(request, 0)

    def _end_wait(self, request: Request) -> None:
        policy_state = request.policy_state
        if self._waiting.end(request) and policy_state.is_displaced:
            policy_state.is_displaced = False
            del self._displaced[request.level][request.request_id]

    # -- estimated next scheduled time -------------------------------------------------------------------------

    def expected_waits(self) -> list[float]:
        """T_execute of each queue in use: seconds until those in the queues above have been brought down to it.

        Every request above costs the quanta from its queue down to, not including, this one; those served at a time
        share them.
        """
        version = self.queue.version
        if version != self._waits_version:
            self._waits_version = version
            wait, num_above, per_place = 0.0, 0, 1 / self.config.num_places
            self._waits = waits = [0.0]
            for level, quantum in zip(self.queue.fixed_levels[: self.queue.deepest], self.quanta, strict=False):
                num_above += level.size
                wait += num_above * quantum * per_place
                waits.append(wait)
        return self._waits

    def urgency(self, request: Request, now: float) -> tuple[float, ...]:
        """Estimated next scheduled time (ENST, s from now): promotion or execution, whichever is first; then order."""
        return self._key(request, now, self.expected_waits(), 1)

    def _key(self, request: Request, now: float, waits: list[float], sign: int) -> tuple[float, int, int]:
        # One that runs still has no deadline; if it stops now, it will wait alpha.
        enst = min(request.policy_state.deadline - now, self._longest_wait_s, waits[request.level])
        return sign * enst, sign * request.level, sign * self._tie_sign * request.position

    def uploads(self, now: float) -> Iterator[Request]:
        """By smallest ENST; those with the same by their queue, and then by their place in it."""
        return self._by_enst(SWAPPED_OUT, now, 1)

    def offloads(self, now: float) -> Iterator[Request]:
        """By largest ENST, in the reverse order of `uploads`."""
        return self._by_enst(RESIDENT, now, -1)

    def _by_enst(self, part: CacheState, now: float, sign: int) -> Iterator[Request]:
        """By smallest ENST (1) or largest (-1).

        Within a queue T_execute is the same and the deadlines of promotion are in the order of the places, but for the
        few that were displaced. So the heads of the queues compete, and of each queue's displaced, sorted.
        """
        waits = self.expected_waits()
        heads = []
        for level, displaced in zip(self.queue.fixed_levels[: self.queue.deepest + 1], self._displaced, strict=False):
            line = level.lines[part]
            if not (line.main or line.put_back):
                continue
            rests = [iter(line) if sign == self._tie_sign else reversed(line)]
            if displaced:
                others = [request for request in displaced.values() if request.cache_state == part]
                others.sort(key=lambda request: self._key(request, now, waits, sign))
                rests = [(request for request in rests[0] if not request.policy_state.is_displaced), iter(others)]
            for rest in rests:
                for request in rest:
                    heads.append((self._key(request, now, waits, sign), request, rest))
                    break
        heapq.heapify(heads)
        while heads:
            _, request, rest = heads[0]
            yield request
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (self._key(following, now, waits, sign), following, rest))

    # -- identical decisions -----------------------------------------------------------------------------------

    def steady_until(self, now: float) -> float:
        """When the first quantum is used up or the first wait ends; `now` if the last decision left somebody out."""
        if not self.is_clear:
            return now
        used_up = self._used_up
        left = min([used_up[request.level] - request.policy_state.service_s for request in self.running.values()])
        if self.options.starvation_check_every > 1 or not self._waiting:
            return now + left
        return min(now + left, self._waiting.first_deadline)

    def update_repeated(self, iteration: Iteration, times: np.ndarray) -> None:
        """Charge them, and count the decisions that were not made."""
        super().update_repeated(iteration, times)
        every = self.options.starvation_check_every
        self._decisions_to_check = (self._decisions_to_check - (len(times) - 2) - 1) % every + 1

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """Until someone has used up a quantum or waited too long, if nobody waits for room and nothing moves."""
        if not self.is_clear:
            return 1
        count = self.decisions_without_moves(times, free_blocks)
        if self.options.starvation_check_every > 1:
            count = min(count, self._decisions_to_check)
        elif self._waiting:
            first = self._waiting.first_deadline
            # Iteration k is decided at times[k], and those who are due by then are promoted first.
            count = min(count, max(1, int(np.searchsorted(times[:count], first, side="left"))))
        durations = np.diff(times[: count + 1])
        running = list(self.running.values())
        service = np.empty((len(running), count + 1))
        service[:, 0] = [request.policy_state.service_s for request in running]
        service[:, 1:] = durations
        used_up = np.array([self._used_up[request.level] for request in running])
        reached = (np.add.accumulate(service, axis=1)[:, 1:] >= used_up[:, None]).any(axis=0)
        return int(np.argmax(reached)) + 1 if reached.any() else count
