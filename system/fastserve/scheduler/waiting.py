"""WaitList: requests that wait for a place in the batch, by the time at which their wait becomes too long."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator

from fastserve.core.request import Request


class WaitList:
    """Waiting requests in order of `request.wait_ends_s`, the time (s) at which each has waited `longest_wait_s`.

    All waits have the same limit, so the newest wait ends last and a request joins at the back. The exception is a
    pipeline: a request may join, while the first stage is busy, after another's iteration has ended. Without a limit
    (None) the list stays empty.
    """

    def __init__(self, longest_wait_s: float | None) -> None:
        self.longest_wait_s = longest_wait_s
        self._decided_s = self._decided_before_s = -math.inf
        """When the current or last decision was taken, and the one before it."""
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._last_since = -math.inf
        """When the latest of all waits so far began."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def start(self, request: Request, since: float) -> None:
        """The request has waited since then (s)."""
        if self.longest_wait_s is None:
            return
        ends_s = request.wait_ends_s = since + self.longest_wait_s
        requests = self._requests
        requests[request.request_id] = request
        if since >= self._last_since:
            self._last_since = since
            return
        later = []
        for other in itertools.islice(reversed(requests.values()), 1, None):
            if other.wait_ends_s <= ends_s:
                break
            later.append(other)
        for other in reversed(later):
            requests.move_to_end(other.request_id)

    def start_preempted(self, request: Request, now: float) -> None:
        """The request lost its place by the current decision.

        Its iteration ended just now, or, in a pipeline, while the first stage was busy, and it has waited since.
        """
        ended_s = request.last_ran_s
        self.start(request, ended_s if ended_s > self._decided_before_s else now)

    def end(self, request: Request) -> None:
        """The request waits no longer, if it did."""
        if request.wait_ends_s != math.inf:
            del self._requests[request.request_id]
            request.wait_ends_s = math.inf

    def decide(self, now: float) -> None:
        """A decision is about to be taken."""
        self._decided_before_s, self._decided_s = self._decided_s, now

    def due(self, now: float) -> list[Request]:
        """Requests that have waited too long, the longest wait first."""
        due = []
        for request in self._requests.values():
            if request.wait_ends_s > now:
                break
            due.append(request)
        return due

    @property
    def first_end_s(self) -> float:
        """The earliest `wait_ends_s`; infinite if no request waits."""
        return next(iter(self._requests.values())).wait_ends_s if self._requests else math.inf
