"""Estimated next scheduled time (ENST): the order in which FastServe moves caches (paper, section 4.2)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.scheduler.need import NeedOrder
from fastserve.scheduler.queue import MultiLevelQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class EstimatedNextScheduledTime(NeedOrder):
    """Requests of a multi-level feedback queue by the time to their promotion or execution, whichever is first.

    Within a queue T_execute is the same for all and promotions are due in the order of the places, except for the few
    displaced requests: preempted within their quantum, they keep their place but wait longer than the requests behind.
    So a walk compares the heads of the queues, and of each queue's displaced requests, sorted.
    """

    def __init__(
        self,
        queue: MultiLevelQueue,
        quanta: Sequence[float],
        num_places: int,
        longest_wait_s: float | None,
        *,
        front_first: bool,
    ) -> None:
        """`quanta` in seconds, by level; `front_first`: within a queue the request at the front is needed first."""
        self._queue = queue
        self._quanta = quanta
        self._num_places = num_places
        self._longest_wait_s = math.inf if longest_wait_s is None else longest_wait_s
        self._tie_sign = 1 if front_first else -1
        self._waits: list[float] = []
        self._waits_version = -1
        self._displaced: list[dict[str, Request]] = [{} for _ in quanta]
        """Of each level."""

    def displace(self, request: Request) -> None:
        """Its promotion is due later than that of the requests behind it."""
        self._displaced[request.level][request.request_id] = request

    def restore(self, request: Request) -> None:
        """Its wait is over; call it before the request changes levels."""
        displaced = self._displaced[request.level]
        if displaced:
            displaced.pop(request.request_id, None)

    def expected_waits(self) -> list[float]:
        """T_execute of each queue in use: seconds until the requests in the queues above have come down to it.

        Every request above costs the quanta from its queue down to, not including, this one; requests served at a time
        share them.
        """
        version = self._queue.version
        if version != self._waits_version:
            self._waits_version = version
            wait, num_above, per_place = 0.0, 0, 1 / self._num_places
            self._waits = waits = [0.0]
            for level, quantum in zip(self._queue.fixed_levels[: self._queue.deepest], self._quanta, strict=False):
                num_above += level.size
                wait += num_above * quantum * per_place
                waits.append(wait)
        return self._waits

    def key(self, request: Request, now: float) -> tuple[float, ...]:
        """ENST (s from now); requests with the same by their queue, and then by their place in it."""
        return self._key(request, now, self.expected_waits(), 1)

    def swapped_out(self, now: float) -> Iterator[Request]:
        """By smallest ENST."""
        return self._walk(SWAPPED_OUT, now, 1)

    def victims(self, now: float) -> Iterator[Request]:
        """By largest ENST."""
        return self._walk(RESIDENT, now, -1)

    def _key(self, request: Request, now: float, waits: list[float], sign: int) -> tuple[float, int, int]:
        # A running request has no deadline; if it stops now, it will wait `longest_wait_s`.
        enst = request.wait_ends_s - now
        if enst > self._longest_wait_s:
            enst = self._longest_wait_s
        if enst > waits[request.level]:
            enst = waits[request.level]
        return sign * enst, sign * request.level, sign * self._tie_sign * request.position

    def _walk(self, state: CacheState, now: float, sign: int) -> Iterator[Request]:
        """By smallest ENST (1) or largest (-1)."""
        waits = self.expected_waits()
        heads = []
        for level, displaced in zip(self._queue.fixed_levels[: self._queue.deepest + 1], self._displaced, strict=False):
            line = level.lines[state]
            if not line.size:
                continue
            rests = [line.forward() if sign == self._tie_sign else line.backward()]
            if displaced:
                rests = self._apart(rests[0], displaced, state, now, waits, sign)
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

    def _apart(
        self,
        line: Iterator[Request],
        displaced: dict[str, Request],
        state: CacheState,
        now: float,
        waits: list[float],
        sign: int,
    ) -> list[Iterator[Request]]:
        """A line without its displaced requests, and these in order."""
        others = [request for request in displaced.values() if request.line == state]
        others.sort(key=lambda request: self._key(request, now, waits, sign))
        return [_others(line, displaced), iter(others)]


def _others(line: Iterator[Request], displaced: Mapping[str, Request]) -> Iterator[Request]:
    for request in line:
        if request.request_id not in displaced:
            yield request
