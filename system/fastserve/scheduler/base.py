"""Scheduler: the interface, and what all policies share. A policy decides an order; the rest is here and in plan.py."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastserve.core.config import SchedulerConfig
from fastserve.core.request import RESIDENT, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache import Direction, KVCacheManager, Transfer
from fastserve.latency import LatencyModel
from fastserve.scheduler.iteration import Iteration, IterationResult
from fastserve.scheduler.plan import IterationPlan
from fastserve.scheduler.queue import MultiLevelQueue, ServiceOrder
from fastserve.scheduler.swapping import MemoryOptions, ProactiveSwapping, SwapMode


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a policy that has none."""


class Scheduler(ABC):
    """Decides what each iteration runs. Sees prompts and progress, never the coming output length.

    A policy says in which queue a request stands: it puts a new one there (`on_add`, by `self.queue.join`), and moves
    one that has made progress (`on_progress`, by `self.queue.move`). Queues are numbered, smaller is more urgent, and
    each is first in, first out. This class fills the batch in that order within the batch size, the token budget and
    the cache, and moves caches the way the option `swap` says. A policy that fills its batch by another rule
    overrides `decide` and builds an `IterationPlan` itself.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]] = MemoryOptions
    Swapping: ClassVar[type[ProactiveSwapping]] = ProactiveSwapping
    """Who decides what moves when `swap` is proactive."""
    moves_in_order: ClassVar[bool] = True
    """Whether `uploads` and `offloads` follow the order of service, so that a search may end where that does."""
    max_passed_over: int = 0
    """Requests beyond the token budget that are passed over in one decision before no prompt is tried any more."""

    needs_latency: ClassVar[bool] = False
    """Whether it asks `latency`; a real engine then measures itself before it starts, unless given a profile."""

    needs_oracle: ClassVar[bool] = False
    """Whether it must be told the coming output length, which no real system knows: a bound, not a competitor."""

    learns: ClassVar[bool] = False
    """Whether finished requests teach it what to expect of others."""

    oracle: Callable[[Request], int]
    """Output tokens still to come of a request. Set by the engine for a policy that `needs_oracle`."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: Any = None) -> None:
        self.config = config
        self.kv = kv
        self.latency = latency
        self.options = self.Options() if options is None else options
        self.queue: Any = self.make_queue()
        """A ServiceOrder; unless `make_queue` says otherwise a MultiLevelQueue."""
        self.running: dict[str, Request] = {}
        """Requests that hold a place in a batch: the last one decided on, and in a pipeline all in flight. Nobody in
        flight is taken into a plan, loses its cache or is preempted."""
        self.swap: SwapMode = getattr(self.options, "swap", "recompute")
        self.moves_on_demand = self.swap in ("reactive", "recompute")
        self._swapping = self.Swapping(self, self.options) if self.swap == "proactive" else None
        self.is_clear = False
        """Whether the last decision left nobody out who could run and moved nothing."""
        self._requests: dict[str, Request] = {}
        self._stalled: tuple[Request, ...] = ()

    # -- the contract with the engine ----------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Unfinished requests in the system."""
        return len(self._requests)

    @property
    def is_idle(self) -> bool:
        """Whether no iteration is in flight."""
        return not any(request.in_flight for request in self.running.values())

    def add(self, request: Request) -> None:
        """A request has arrived."""
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is already in the system")
        self._requests[request.request_id] = request
        if self._swapping is not None:
            self._swapping.arrived(request)
        self.on_add(request)

    def schedule(self, now: float) -> Iteration:
        """Decide the next iteration, at `now` in seconds. One without requests is the decision to wait."""
        # A batch that caches are being moved for stays chosen until they have all arrived.
        if self._stalled and self.kv.num_transfers:
            return Iteration(stalled=self._stalled)
        self.prepare(now)
        iteration = self.decide(now)
        self._stalled = () if iteration.requests or self._swapping is not None else iteration.stalled
        return iteration

    def update(self, iteration: Iteration, result: IterationResult) -> list[Request]:
        """An iteration has ended and the engine has advanced its requests. Returns those that leave the system."""
        leaving = []
        for request in iteration.requests:
            if request.status is RequestStatus.ACTIVE:
                self.on_progress(request, result.start_s, result.end_s)
            else:
                self._remove(request)
                leaving.append(request)
        return leaving

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request and free its cache; KeyError if it is not in the system."""
        self._stalled = ()
        self._remove(self._requests[request_id])

    def learn(self, num_prompt_tokens: int, num_output_tokens: int) -> None:  # noqa: B027 (optional hook)
        """A request of these lengths finished before this run; for a policy that `learns`."""

    def complete(self, transfer: Transfer, duration_s: float) -> None:
        """A transfer has ended, and it took the link so many seconds."""
        self.kv.complete(transfer)
        request = transfer.request
        if transfer.direction is Direction.IN and self._requests.get(request.request_id) is request:
            self.queue.put(request, RESIDENT)
            request.num_tokens_at_swap_in = request.num_computed_tokens

    def steady_until(self, now: float) -> float:
        """Until when (s) decisions may be alike, infinite if not known: a cheap guess before `repeats` is asked."""
        return math.inf

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """How many iterations from the one just decided on would be decided alike, each computing one token more.

        Iteration k would take from `times[k]` to `times[k + 1]` (seconds) with `free_blocks[k]` free on the GPU once it
        is decided. The engine has made sure that until the last of them starts nobody arrives or finishes, no transfer
        ends, and no growth fails. 1 is always right, and what a policy that cannot tell returns.
        """
        return 1

    def update_repeated(self, iteration: Iteration, times: np.ndarray) -> None:
        """Iterations alike have ended, one after the other, at `times[1:]`; nobody has finished."""
        if type(self).on_progress is not Scheduler.on_progress:
            for start, end in itertools.pairwise(times.tolist()):
                for request in iteration.requests:
                    self.on_progress(request, start, end)

    # -- what a policy provides ----------------------------------------------------------------------------------

    def make_queue(self) -> ServiceOrder:
        """The queue requests are kept in: here, levels that are each first in, first out."""
        return MultiLevelQueue()

    @abstractmethod
    def on_add(self, request: Request) -> None:
        """Put a new request into its queue: `self.queue.join(request, level)`."""

    def on_progress(self, request: Request, start: float, end: float) -> None:  # noqa: B027 (optional hook)
        """An unfinished request took part in an iteration from `start` to `end` (seconds)."""

    def on_remove(self, request: Request) -> None:  # noqa: B027 (optional hook)
        """A finished or aborted request leaves."""

    def on_start(self, request: Request, now: float) -> None:  # noqa: B027 (optional hook)
        """A request takes a place in the batch."""

    def on_preempt(self, request: Request, now: float) -> None:  # noqa: B027 (optional hook)
        """An unfinished request lost its place in the batch."""

    def prepare(self, now: float) -> None:  # noqa: B027 (optional hook)
        """Called before every decision, for what depends on time."""

    def offer(self, plan: IterationPlan, request: Request) -> bool:
        """Offer a request to the plan on the policy's terms: here, it may take cache from those that rank behind it."""
        return plan.offer(request)

    def uploads(self, now: float) -> Iterator[Request]:
        """Requests whose cache is away, the one needed first before the others. Here: in order."""
        return self.queue.swapped_out()

    def offloads(self, now: float) -> Iterator[Request]:
        """Requests whose cache is on the GPU, the one needed last before the others. Here: last in order first."""
        return self.queue.victims()

    def urgency(self, request: Request, now: float) -> tuple[float, ...]:
        """A key that agrees with `uploads` and `offloads`: smaller is needed sooner."""
        return self.queue.key(request)

    # -- shared --------------------------------------------------------------------------------------------------

    def decisions_without_moves(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """How many decisions in a row, as in `repeats`, move no cache if nobody comes, goes or changes places."""
        return len(free_blocks) if self._swapping is None else self._swapping.idle_for(float(times[0]), free_blocks)

    def decide(self, now: float) -> Iteration:
        """Fill the batch in order."""
        plan = IterationPlan(self, now)
        self.fill(plan)
        self.is_clear = plan.is_clear
        # Those in flight may leave room when they end.
        if not plan.batch and not self.kv.num_transfers and self._requests and self.is_idle:
            self._force(plan)
        return plan.close()

    def fill(self, plan: IterationPlan) -> None:
        """Offer everyone who could run to the plan, in order, and start the transfers that run beside it."""
        batch, size = plan.batch, plan.batch_size
        offer, take = self.offer, plan.take_if_ready
        plan.counting_away = self.moves_on_demand
        for request in self.queue.candidates(plan):
            if request.in_flight:
                continue
            if not take(request):
                offer(plan, request)
            if len(batch) >= size:
                break
        num_chosen = len(batch)
        if self._swapping is not None:
            self._swapping.move(plan)
        # Somebody had to give up a place for one who is due, or a dropped cache left room: others may take it.
        if len(batch) < size and (len(batch) < num_chosen or plan.drops):
            self._fill_up(plan, admitting=plan.drops)

    def on_no_room(self, plan: IterationPlan, request: Request, needed: int) -> None:
        """A request needs more blocks than are free; unless there are enough after this, it is left out of the plan."""
        if self._swapping is not None and plan.making_room:
            self._swapping.make_room(plan, request, needed)

    def _force(self, plan: IterationPlan) -> None:
        """Nothing can run and nothing moves: the first in order gets the room it needs, whoever must give up theirs."""
        first = next((request for request in self.queue.in_order() if request.cache_state != SWAPPED_OUT), None)
        if first is not None:
            plan.force(first)
            self._fill_up(plan, admitting=True)

    def _fill_up(self, plan: IterationPlan, *, admitting: bool) -> None:
        """Offer what room is left to those who have their cache (and those who have none, if `admitting`)."""
        plan.admitting, plan.counting_away, plan.making_room = admitting, False, False
        for request in self.queue.candidates(plan):
            if plan.is_full:
                return
            if request not in plan.batch:
                self.offer(plan, request)

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        self.running.pop(request.request_id, None)
        self.queue.remove(request)
        self.on_remove(request)
        self.kv.release(request)
