"""Observer: receives the engine's events as they happen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fastserve.core.clock import Clock
from fastserve.core.request import Request
from fastserve.engine.executor import FinishedTransfer
from fastserve.engine.job import Job
from fastserve.kvcache import KVCacheManager
from fastserve.scheduler import Iteration


class EngineView(Protocol):
    """The part of an engine that an observer may read."""

    @property
    def clock(self) -> Clock:
        """The clock that all times are read from."""

    @property
    def kv(self) -> KVCacheManager:
        """The cache manager."""

    @property
    def jobs(self) -> Mapping[str, Job]:
        """Unfinished requests by id."""


class Observer:
    """Base of observers: override the events of interest; the others do nothing.

    Set one as `engine.observer`; the engine then steps every iteration. Times are seconds on the engine's clock.
    """

    def on_arrival(self, job: Job) -> None:
        """A request has entered the system."""

    def on_submit(self, iteration: Iteration) -> None:
        """A decision was submitted; without requests it may still move or drop caches."""

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """An iteration has ended; its requests have not advanced yet."""

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        """A request has a new token; `previous_s` is the time of the token before, None for the first.

        At the last token the status is FINISHED already; `on_done` follows when the policy lets the request leave.
        """

    def on_stall(self, engine: EngineView, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """No iteration was started between these times. The `stalled` requests were due and waited for a transfer; if
        there are none, nothing was in flight either."""

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        """From one decision to the next, these requests were due and waited for a transfer; others may have run."""

    def on_transfer(self, finished: FinishedTransfer) -> None:
        """A transfer has ended."""

    def on_done(self, job: Job) -> None:
        """A request has left the system: finished, aborted or failed."""


class Observers(Observer):
    """Several observers as one; events reach them in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_arrival(self, job: Job) -> None:  # noqa: D102 (as in Observer)
        for observer in self._observers:
            observer.on_arrival(job)

    def on_submit(self, iteration: Iteration) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_submit(iteration)

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_iteration(engine, iteration, start_s, end_s)

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_token(job, token, at_s, previous_s)

    def on_stall(self, engine: EngineView, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_stall(engine, stalled, start_s, end_s)

    def on_swap_wait(self, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_swap_wait(stalled, start_s, end_s)

    def on_transfer(self, finished: FinishedTransfer) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_transfer(finished)

    def on_done(self, job: Job) -> None:  # noqa: D102
        for observer in self._observers:
            observer.on_done(job)
