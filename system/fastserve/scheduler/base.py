"""Scheduler: the interface, and what all policies share. A policy decides an order; the rest is here and in plan.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastserve.config import SchedulerConfig
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.request import Request, RequestStatus
from fastserve.scheduler.iteration import Iteration
from fastserve.scheduler.plan import IterationPlan

if TYPE_CHECKING:
    from fastserve.executor.base import IterationResult

SwapMode = Literal["reactive", "recompute"]
"""What happens to the cache of a request that must leave the GPU: moved to host memory when the room is needed, the
batch waiting for it; or dropped and computed again."""


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a policy that has none."""


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Options of a policy that may have to take a request's cache off the GPU."""

    swap: SwapMode = "reactive"


class Scheduler(ABC):
    """Decides what each iteration runs. Sees prompts and progress, never the coming output length.

    A subclass names itself and its options, keeps its requests in an order of its own (`on_add`, `on_remove`,
    `on_progress`), and hands that order out (`in_order`, `rank`). This class fills the batch in that order within the
    batch size, the token budget and the cache, takes the cache of those last in the order when one before them needs
    it, and keeps track of who runs. A policy that fills its batch by another rule overrides `schedule` and builds an
    `IterationPlan` itself.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]] = NoOptions
    head_of_line: ClassVar[bool] = False
    """Whether a request that does not fit blocks all behind it (first come, first served) or is passed over."""

    needs_latency: ClassVar[bool] = False
    """Whether it asks `latency`; a real engine then measures itself before it starts, unless given a profile."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: Any = None) -> None:
        self.config = config
        self.kv = kv
        self.latency = latency
        self.options = self.Options() if options is None else options
        self.swap: SwapMode = getattr(self.options, "swap", "recompute")
        self.running: dict[str, Request] = {}
        """Requests that hold a place in the batch."""
        self._requests: dict[str, Request] = {}

    # -- the contract with the engine ----------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Unfinished requests in the system."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """A request has arrived."""
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is already in the system")
        self._requests[request.request_id] = request
        self.on_add(request)

    def schedule(self, now: float) -> Iteration:
        """Decide the next iteration. Without requests and without stalled ones there is nothing that can run now."""
        self.prepare(now)
        plan = IterationPlan(self, now)
        for request in self.in_order():
            if not self.offer(plan, request) and (self.head_of_line or plan.is_full):
                break
        return plan.decide()

    def update(self, iteration: Iteration, result: IterationResult) -> None:
        """An iteration has ended and the engine has advanced its requests; those that finished leave."""
        for request in iteration.requests:
            if request.status is RequestStatus.ACTIVE:
                self.on_progress(request, result.start_s, result.end_s)
            else:
                self._remove(request)

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request and free its cache; KeyError if it is not in the system."""
        self._remove(self._requests[request_id])

    # -- what a policy provides ----------------------------------------------------------------------------------

    @abstractmethod
    def in_order(self) -> Iterable[Request]:
        """Every request in the system, most urgent first. Read lazily: a batch costs its length, not the queue's."""

    @abstractmethod
    def rank(self, request: Request) -> Any:
        """A sort key that agrees with `in_order`: smaller is more urgent. The largest lose their cache first."""

    @abstractmethod
    def on_add(self, request: Request) -> None:
        """Take a new request into the order."""

    @abstractmethod
    def on_remove(self, request: Request) -> None:
        """Take a finished or aborted request out of the order."""

    def offer(self, plan: IterationPlan, request: Request) -> bool:
        """Offer a request to the plan on the policy's terms: here, it may take cache from those that rank behind it."""
        return plan.offer(request)

    def on_progress(self, request: Request, start: float, end: float) -> None:  # noqa: B027 (optional hook)
        """An unfinished request took part in an iteration from `start` to `end` (seconds)."""

    def on_start(self, request: Request, now: float) -> None:  # noqa: B027 (optional hook)
        """A request takes a place in the batch."""

    def on_preempt(self, request: Request, now: float) -> None:  # noqa: B027 (optional hook)
        """An unfinished request lost its place in the batch."""

    def prepare(self, now: float) -> None:  # noqa: B027 (optional hook)
        """Called first in `schedule`, for what depends on time."""

    # -- shared --------------------------------------------------------------------------------------------------

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        self.running.pop(request.request_id, None)
        self.on_remove(request)
        self.kv.release(request)
