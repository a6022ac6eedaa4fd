"""NeedOrder: which request needs its cache on the GPU when. Caches that move ahead of need follow it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import Request
from fastserve.scheduler.queue import ServiceOrder


@mypyc_attr(allow_interpreted_subclasses=True)
class NeedOrder(ABC):
    """The order in which requests will need their caches. Times are seconds."""

    @abstractmethod
    def swapped_out(self, now: float) -> Iterator[Request]:
        """Requests that are swapped out, the one needed soonest first."""

    @abstractmethod
    def victims(self, now: float) -> Iterator[Request]:
        """Requests with their cache on the GPU, the one needed last first."""

    @abstractmethod
    def key(self, request: Request, now: float) -> tuple[float, ...]:
        """A key that agrees with both walks: smaller is needed sooner."""


@mypyc_attr(allow_interpreted_subclasses=True)
class InServiceOrder(NeedOrder):
    """Requests need their caches in the order of service."""

    def __init__(self, queue: ServiceOrder) -> None:
        self._queue = queue

    def swapped_out(self, now: float) -> Iterator[Request]:
        """Most urgent first."""
        return self._queue.swapped_out()

    def victims(self, now: float) -> Iterator[Request]:
        """Least urgent first."""
        return self._queue.victims()

    def key(self, request: Request, now: float) -> tuple[float, ...]:
        """Its place in the order."""
        return self._queue.key(request)
