"""Policy: the one class that the author of a policy subclasses."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager, Transfer
from fastserve.latency import LatencyModel
from fastserve.scheduler.batch import DEFAULT_TERMS, Batch, Terms
from fastserve.scheduler.moving import MoveAhead
from fastserve.scheduler.need import InServiceOrder, NeedOrder
from fastserve.scheduler.options import MemoryOptions, PolicyOptions, SwapMode
from fastserve.scheduler.queue import MultiLevelQueue, ServiceOrder
from fastserve.scheduler.waiting import WaitList


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy(ABC):
    """Decides in which order requests run. Sees prompts and progress, never the output length to come.

    A policy says in which queue a request stands: `on_add` puts a new request there (`self.queue.join`), `on_progress`
    moves it (`self.queue.move`). Queues are numbered, smaller is more urgent, and each is first in, first out. The
    `Scheduler` fills batches in this order within the batch size, the token budget and the cache, and moves caches as
    the option `swap` says.
    """

    # -- what a policy says of itself ------------------------------------------------------------------------------

    name: ClassVar[str]
    Options: ClassVar[type[PolicyOptions]] = MemoryOptions
    """Frozen dataclass of the options that `--set` takes."""
    needs_latency: ClassVar[bool] = False
    """Whether the policy asks `self.latency`; a real engine is then measured before it starts, or needs a profile."""
    needs_oracle: ClassVar[bool] = False
    """Whether the policy asks `self.oracle`, which no real system has: it is a bound, not a competitor."""
    learns: ClassVar[bool] = False
    """Whether finished requests teach the policy what to expect of others."""

    max_passed_over: int = 0
    """Prompts beyond the token budget that a decision passes over before it tries no further prompt."""

    # -- what a policy can use -------------------------------------------------------------------------------------

    config: SchedulerConfig
    kv: KVCacheManager
    latency: LatencyModel
    options: PolicyOptions
    queue: ServiceOrder
    """What `make_queue` returned."""
    running: dict[str, Request]
    """Requests with a place in a batch, by id: those of the last decision, and in a pipeline all in flight. Requests in
    flight are not offered a place, and keep their caches."""
    waiting: WaitList
    """Requests that wait and must not wait longer than `longest_wait_s`."""
    oracle: Callable[[Request], int]
    """Output tokens still to come of a request. Set by the engine for a policy that `needs_oracle`."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        latency: LatencyModel,
        options: PolicyOptions,
        *,
        longest_wait_s: float | None = None,
    ) -> None:
        """`longest_wait_s`: after waiting so many seconds a request is given to `on_starved`; None: never."""
        self.config = config
        self.kv = kv
        self.latency = latency
        self.options = options
        self.queue = self.make_queue()
        self.running = {}
        self.waiting = WaitList(longest_wait_s)

    # -- the life of a request -------------------------------------------------------------------------------------

    @abstractmethod
    def on_add(self, request: Request) -> None:
        """A request has arrived: put it into its queue, `self.queue.join(request, level)`."""

    def on_start(self, request: Request, now: float) -> None:  # noqa: B027 (optional, as all below)
        """A request takes a place in the batch."""

    def on_progress(self, request: Request, start: float, end: float) -> None:  # noqa: B027
        """An unfinished request took part in an iteration from `start` to `end` (seconds)."""

    def on_preempt(self, request: Request, now: float) -> None:  # noqa: B027
        """An unfinished request lost its place in the batch."""

    def on_remove(self, request: Request) -> None:  # noqa: B027
        """A request leaves the system; `request.status` says whether it is finished or aborted."""

    def on_transfer(self, transfer: Transfer, duration_s: float) -> None:  # noqa: B027
        """A transfer of a cache has ended, after so many seconds on the link."""

    # -- time ------------------------------------------------------------------------------------------------------

    def prepare(self, now: float) -> None:  # noqa: B027
        """A decision is about to be taken: update what depends on time."""

    def may_starve(self, request: Request) -> bool:
        """Whether the wait that now begins is limited; asked only if there is a `longest_wait_s`."""
        return True

    def starved(self, now: float) -> Sequence[Request]:
        """The requests to give to `on_starved` before this decision."""
        return self.waiting.due(now)

    def on_starved(self, request: Request, now: float) -> None:  # noqa: B027
        """A request has waited `longest_wait_s`; this wait is counted no further."""

    # -- optional: what is learned ---------------------------------------------------------------------------------

    def learn(self, num_prompt_tokens: int, num_output_tokens: int) -> None:  # noqa: B027
        """A request of these lengths finished before this run; for a policy that `learns`."""

    # -- optional: admission and order -----------------------------------------------------------------------------

    def make_queue(self) -> ServiceOrder:
        """The queue that holds the requests: here, levels that are each first in, first out."""
        return MultiLevelQueue()

    def terms(self, request: Request, batch: Batch) -> Terms:
        """The terms on which a request gets room for its cache; `batch` holds the requests taken before it."""
        return DEFAULT_TERMS

    def need_order(self) -> NeedOrder:
        """Which request needs its cache when, for proactive swapping: here, in the order of service."""
        return InServiceOrder(self.queue)

    def admits(self, request: Request) -> bool:
        """Whether a request without a cache may get one in this decision; one that may not is passed over."""
        return True

    def mover_class(self) -> type[MoveAhead]:
        """What moves caches when `swap` is proactive."""
        return MoveAhead

    # -- optional: jumps over identical decisions ------------------------------------------------------------------

    def steady_until(self, now: float, is_clear: bool) -> float:
        """A cheap upper bound, in seconds on the engine's clock, of the time until which decisions may be alike.

        `is_clear`: the last decision ran every request it could and moved nothing.
        """
        return math.inf

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """How many iterations, from the one just decided on, would be decided alike and compute one token more each.

        Iteration k would last from `times[k]` to `times[k + 1]` (seconds). Until the last of them starts no request
        arrives or finishes, no transfer starts or ends, and every cache can grow. 1 is always right.
        """
        return 1

    def on_repeated(self, requests: Sequence[Request], times: np.ndarray) -> None:
        """The requests took part in iterations that ended, one after the other, at `times[1:]`."""
        if type(self).on_progress is not Policy.on_progress:
            for start, end in itertools.pairwise(times.tolist()):
                for request in requests:
                    self.on_progress(request, start, end)

    # -- optional: batches filled by another rule ------------------------------------------------------------------

    padded: ClassVar[bool] = False
    """Whether every row of an iteration is padded to the longest."""
    keeps_places: ClassVar[bool] = False
    """Whether a request left out of an iteration keeps its place in the batch as long as it keeps its cache."""

    def fill(self, batch: Batch) -> bool:
        """Fill the batch by another rule than the order of service, and return True; here, False."""
        return False

    def leaving(self, request: Request) -> Sequence[Request]:
        """The requests that leave the system now that this one has its last token or was aborted in flight."""
        return (request,)

    # -- shared ----------------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether no iteration is in flight."""
        return not any(request.in_flight for request in self.running.values())

    @property
    def swap(self) -> SwapMode:
        """How caches move; a policy without this option drops and recomputes."""
        return getattr(self.options, "swap", "recompute")
