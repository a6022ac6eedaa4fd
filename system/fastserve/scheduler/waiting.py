"""Who waits for a place in the batch, and until when: what prevention of starvation rests on."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from fastserve.core.request import Request


class PolicyState(Protocol):
    """What a `WaitList` keeps in `request.policy_state`."""

    deadline: float
    """When its current wait has lasted as long as one may (s); infinite while it does not wait."""
    ended_s: float
    """When its last iteration ended. Kept by the policy."""


class WaitList:
    """Requests that wait, in order of their deadlines.

    Every wait may last as long, so each new one is the last to end: a request joins at the back. The exception is a
    pipeline, where one may come, while the first stage is busy, after another's iteration has ended. If a wait may last
    for ever (None), nobody is kept.
    """

    def __init__(self, longest_wait_s: float | None) -> None:
        self._longest_wait_s = longest_wait_s
        self._decided_s = self._decided_before_s = -math.inf
        """When the current or last decision was taken, and the one before it."""
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._last_since = -math.inf
        """When the latest wait began that anybody is in or was in."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def start(self, request: Request, since: float) -> None:
        """The request has waited since then (s)."""
        if self._longest_wait_s is None:
            return
        deadline = request.policy_state.deadline = since + self._longest_wait_s
        requests = self._requests
        requests[request.request_id] = request
        if since >= self._last_since:
            self._last_since = since
            return
        others = itertools.islice(reversed(requests.values()), 1, None)
        for other in reversed(list(itertools.takewhile(lambda r: r.policy_state.deadline > deadline, others))):
            requests.move_to_end(other.request_id)

    def start_preempted(self, request: Request, now: float) -> None:
        """The request lost its place by the current decision.

        Its iteration ended just now, or, in a pipeline, while the first stage was busy, and it has waited since.
        """
        ended_s = request.policy_state.ended_s
        self.start(request, ended_s if ended_s > self._decided_before_s else now)

    def end(self, request: Request) -> bool:
        """The request waits no longer; whether it did."""
        if self._requests.pop(request.request_id, None) is None:
            return False
        request.policy_state.deadline = math.inf
        return True

    def decide(self, now: float) -> None:
        """A decision is about to be taken."""
        self._decided_before_s, self._decided_s = self._decided_s, now

    def due(self, now: float) -> list[Request]:
        """Those whose deadlines have passed, the longest over first."""
        return list(itertools.takewhile(lambda request: request.policy_state.deadline <= now, self._requests.values()))

    @property
    def first_deadline(self) -> float:
        """The next deadline (s), infinite if nobody waits."""
        return next(iter(self._requests.values())).policy_state.deadline if self._requests else math.inf
