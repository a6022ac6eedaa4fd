"""WaitList: requests that wait for a place in the batch, by the time at which their wait becomes too long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from fastserve.core.request import Request

NEVER: Final = math.inf
"""The time at which a wait without limit ends."""


class WaitList:
    """Waiting requests in order of `request.wait_ends_s`, the time (s) at which each has waited `longest_wait_s`.

    All waits have the same limit, so the newest wait ends last and a request joins at the back. The exception is a
    pipeline: a request may join, while the first stage is busy, after another's iteration has ended. Without a limit
    (None) the list stays empty.
    """

    def __init__(self, longest_wait_s: float | None) -> None:
        self.longest_wait_s = longest_wait_s
        self._decided_s = self._decided_before_s = -NEVER
        """When the current or last decision was taken, and the one before it."""
        self._first: Request | None = None
        self._last: Request | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def __iter__(self) -> Iterator[Request]:
        request = self._first
        while request is not None:
            yield request
            request = request.wait_behind

    def start(self, request: Request, since: float) -> None:
        """The request, which does not wait yet, has waited since then (s)."""
        if self.longest_wait_s is None:
            return
        ends_s = request.wait_ends_s = since + self.longest_wait_s
        before = self._last
        while before is not None and before.wait_ends_s > ends_s:
            before = before.wait_before
        behind = self._first if before is None else before.wait_behind
        request.wait_before, request.wait_behind = before, behind
        if before is None:
            self._first = request
        else:
            before.wait_behind = request
        if behind is None:
            self._last = request
        else:
            behind.wait_before = request

    def start_preempted(self, request: Request, now: float) -> None:
        """The request lost its place by the current decision.

        Its iteration ended just now, or, in a pipeline, while the first stage was busy, and it has waited since.
        """
        ended_s = request.last_ran_s
        self.start(request, ended_s if ended_s > self._decided_before_s else now)

    def end(self, request: Request) -> None:
        """The request waits no longer, if it did."""
        if request.wait_ends_s == NEVER:
            return
        before, behind = request.wait_before, request.wait_behind
        if before is None:
            self._first = behind
        else:
            before.wait_behind = behind
        if behind is None:
            self._last = before
        else:
            behind.wait_before = before
        request.wait_before = request.wait_behind = None
        request.wait_ends_s = NEVER

    def decide(self, now: float) -> None:
        """A decision is about to be taken."""
        self._decided_before_s, self._decided_s = self._decided_s, now

    def due(self, now: float) -> list[Request]:
        """Requests that have waited too long, the longest wait first."""
        due = []
        request = self._first
        while request is not None and request.wait_ends_s <= now:
            due.append(request)
            request = request.wait_behind
        return due

    @property
    def first_end_s(self) -> float:
        """The earliest `wait_ends_s`; infinite if no request waits."""
        return NEVER if self._first is None else self._first.wait_ends_s
