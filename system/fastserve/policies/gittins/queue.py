"""The order of service by an index that rises with age: requests alike in all but their age share a line.

A request's index is `weight · (age + lead)^growth`. Weight and lead depend on its kind (fixed when it arrives), its
level (its progress) and the state of its cache. Within a line the oldest comes first at any time, so a decision looks
at the heads of the lines only, and a change of weights touches no request.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.scheduler.queue import ServiceOrder, Wanted

FIRST_OF_ALL: Final = 0
"""The level of requests that come before all others, in the order in which they got there."""
_MARGIN: Final = 1e-9
"""Indices whose logarithms are this far apart now and at a later time are in the same order at any time between."""
_SPARE: Final = 32
"""Free places at the front of a line that are kept without a look at the length of the line."""

_Head = tuple[float, int, int, int]
"""A request in a walk: its key, its position, its line and its index there; key and position negative if backward."""


class Index(NamedTuple):
    """What the requests of one kind are worth: a row for each level, a column for each cache state."""

    log_weights: np.ndarray
    leads_s: np.ndarray


class _Line:
    """Requests in order of position. Most leave at the front, which therefore has free places: `first` of them."""

    __slots__ = ("first", "positions", "requests")

    def __init__(self) -> None:
        self.first = 0
        self.positions: list[int] = []
        self.requests: list[Request] = []

    def __len__(self) -> int:
        return len(self.positions) - self.first

    def insert(self, request: Request) -> None:
        position, positions, first = request.position, self.positions, self.first
        if not positions or position > positions[-1]:
            positions.append(position)
            self.requests.append(request)
        elif first and position < positions[first]:
            self.first = first = first - 1
            positions[first] = position
            self.requests[first] = request
        else:
            index = bisect_left(positions, position, first)
            positions.insert(index, position)
            self.requests.insert(index, request)

    def remove(self, request: Request) -> None:
        position, positions, first = request.position, self.positions, self.first
        if positions[-1] == position:
            positions.pop()
            self.requests.pop()
        elif positions[first] == position:
            self.first = first = first + 1
        else:
            index = bisect_left(positions, position, first)
            del positions[index], self.requests[index]
        if first == len(positions) or (first > _SPARE and 2 * first > len(positions)):
            del positions[:first], self.requests[:first]
            self.first = 0


class Outlook:
    """Some requests, and the first other request of every line: whether the former come first at a later time.

    `weight^(1/growth) · (age + lead)` gives the same order and rises at a constant rate. So of two requests that keep
    their lines, one comes first until some time and the other from then on.
    """

    __slots__ = ("_arrivals_s", "_growth", "_leads_s", "_lines", "_log_weights", "_others")

    def __init__(
        self,
        growth: float,
        log_weights: list[float],
        leads_s: list[float],
        requests: list[tuple[int, float]],
        others: list[tuple[int, float]],
    ) -> None:
        """`requests` and `others`: the line of each and when it arrived (s)."""
        self._growth = growth
        self._log_weights = log_weights
        self._leads_s = leads_s
        self._lines = [line for line, _ in requests]
        self._arrivals_s = [arrival_s for _, arrival_s in requests]
        self._others = others

    def enter_next_level(self, index: int) -> None:
        """The request with this index moves one level on."""
        self._lines[index] += 3

    def holds_at(self, now: float) -> bool:
        """Whether the requests come before all others at a time (s), by more than what rounding changes."""
        growth, log, log_weights, leads_s = self._growth, math.log, self._log_weights, self._leads_s
        last = math.inf
        for line, arrival_s in zip(self._lines, self._arrivals_s, strict=True):
            log_index = log_weights[line]
            if growth:
                log_index += growth * log(now - arrival_s + leads_s[line])
            if log_index < last:
                last = log_index
        last -= _MARGIN
        for line, arrival_s in self._others:
            log_index = log_weights[line]
            if growth:
                log_index += growth * log(now - arrival_s + leads_s[line])
            if log_index >= last:
                return False
        return True


@mypyc_attr(allow_interpreted_subclasses=True)
class IndexQueue(ServiceOrder):
    """Requests by index at the time `now` (s), the highest first; equals in order of arrival.

    `kind_of` tells a request's kind, a small number. Levels are 0 to `num_levels` - 1; requests in level 0 come before
    all others.
    """

    def __init__(self, num_levels: int, growth: float, kind_of: Callable[[Request], int]) -> None:
        self.num_swapped_out = 0
        self.version = 0
        self.now = 0.0
        self._num_levels = num_levels
        self._growth = growth
        self._kind_of = kind_of
        self._last_position = 0
        self._entries: dict[Request, tuple[int, int]] = {}
        """Of each request, the first line of its kind and its position by arrival."""
        self._num_of_kind: list[int] = []
        self._lines: list[_Line] = []
        """By kind, level and cache state, in this order."""
        self._occupied: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        """The lines that hold requests, by cache state."""
        self._log_weights: list[float] = []
        self._leads_s: list[float] = []
        # What is known of the order as long as neither time nor queue changes.
        self._known_version = -1
        self._known_now = 0.0
        self._known: dict[Request, float] = {}
        self._forward: list[_Head] | None = None
        self._swapped_out: list[_Head] | None = None
        self._backward: list[_Head] | None = None

    def add_kind(self) -> None:
        """Add a kind; a request's kind must be known before it joins."""
        lines_of_kind = 3 * self._num_levels
        self._num_of_kind.append(0)
        self._lines += [_Line() for _ in range(lines_of_kind)]
        self._log_weights += [0.0] * lines_of_kind
        self._leads_s += [0.0] * lines_of_kind

    def set_index(self, kind: int, index: Index) -> None:
        """Weigh all requests of a kind anew."""
        self.version += 1
        first = 3 * kind * self._num_levels
        rows = slice(first, first + 3 * self._num_levels)
        self._log_weights[rows] = index.log_weights.ravel().tolist()
        self._log_weights[first : first + 3] = [math.inf] * 3
        self._leads_s[rows] = index.leads_s.ravel().tolist()

    def __len__(self) -> int:
        return len(self._entries)

    def num_of_kind(self, kind: int) -> int:
        """How many requests of a kind are in the queue."""
        return self._num_of_kind[kind]

    # -- changes -----------------------------------------------------------------------------------------------

    def join(self, request: Request, level: int) -> None:  # noqa: D102 (as in ServiceOrder; so below)
        self.version += 1
        state = request.line = request.cache_state
        if state == SWAPPED_OUT:
            self.num_swapped_out += 1
        if request.arrival_s > self.now:
            self.now = request.arrival_s
        kind = self._kind_of(request)
        self._num_of_kind[kind] += 1
        self._last_position = request.position = position = self._last_position + 1
        self._entries[request] = 3 * self._num_levels * kind, position
        self._enter(request, level)

    def move(self, request: Request, level: int) -> None:  # noqa: D102
        self.version += 1
        self._leave(request)
        self._enter(request, level)

    def remove(self, request: Request) -> None:  # noqa: D102
        self.version += 1
        if request.line == SWAPPED_OUT:
            self.num_swapped_out -= 1
        self._leave(request)
        first_line, _ = self._entries.pop(request)
        self._num_of_kind[first_line // (3 * self._num_levels)] -= 1

    def refile(self, request: Request) -> None:  # noqa: D102
        # Its weight changes with the state of its cache.
        state = request.cache_state
        self.version += 1
        self.num_swapped_out += (state == SWAPPED_OUT) - (request.line == SWAPPED_OUT)
        self._leave(request)
        request.line = state
        self._enter(request, request.level)

    def _line_of(self, request: Request) -> int:
        return self._entries[request][0] + 3 * request.level + request.line

    def _enter(self, request: Request, level: int) -> None:
        first_line, position = self._entries[request]
        if level != FIRST_OF_ALL:
            request.position = position
        elif request.level != level:
            self._last_position += 1
            request.position = self._last_position
        request.level = level
        number = first_line + 3 * level + request.line
        line = self._lines[number]
        if not line.positions:
            self._occupied[request.line].add(number)
        line.insert(request)

    def _leave(self, request: Request) -> None:
        number = self._line_of(request)
        line = self._lines[number]
        line.remove(request)
        if not line.positions:
            self._occupied[request.line].remove(number)

    # -- the order ---------------------------------------------------------------------------------------------

    def key(self, request: Request) -> tuple[float, ...]:  # noqa: D102
        return -self._present(request), request.position

    def is_before(self, request: Request, other: Request) -> bool:  # noqa: D102
        log_index, log_index_of_other = self._present(request), self._present(other)
        if log_index == log_index_of_other:
            return request.position < other.position
        return log_index > log_index_of_other

    def _present(self, request: Request) -> float:
        """The logarithm of a request's index, computed once for each time and state of the queue."""
        if self._known_version != self.version or self._known_now != self.now:
            self._forget_the_past()
        log_index = self._known.get(request)
        if log_index is None:
            log_index = self._known[request] = self._log_index(request, self._line_of(request))
        return log_index

    def fits(self, request: Request, places: int) -> bool:
        """Whether the request is in level 0, or all requests are no more than `places`.

        Otherwise any other request may come before it in a while.
        """
        return request.level == FIRST_OF_ALL or len(self._entries) <= places

    def sizes(self) -> list[tuple[int, int, int, int]]:  # noqa: D102
        lengths = np.array([len(line) for line in self._lines]).reshape(-1, self._num_levels, 3).sum(axis=0)
        return [(level, *counts) for level, counts in enumerate(lengths.tolist()) if any(counts)]

    def _log_index(self, request: Request, line: int) -> float:
        """The logarithm of a request's index: the larger, the more urgent."""
        log_weight = self._log_weights[line]
        if not self._growth:
            return log_weight
        return log_weight + self._growth * math.log(self.now - request.arrival_s + self._leads_s[line])

    # -- walks -------------------------------------------------------------------------------------------------

    def in_order(self) -> Iterator[Request]:  # noqa: D102
        return self._walk(self._heads_forward(), 1, None)

    def candidates(self, wanted: Wanted) -> Iterator[Request]:  # noqa: D102
        return self._walk(self._heads_forward(), 1, wanted)

    def swapped_out(self) -> Iterator[Request]:  # noqa: D102
        self._forget_the_past()
        if self._swapped_out is None:
            self._swapped_out = self._heads((SWAPPED_OUT,), 1)
        return self._walk(self._swapped_out, 1, None)

    def victims(self) -> Iterator[Request]:  # noqa: D102
        self._forget_the_past()
        if self._backward is None:
            self._backward = self._heads((RESIDENT,), -1)
        return self._walk(self._backward, -1, None)

    def _heads_forward(self) -> list[_Head]:
        self._forget_the_past()
        if self._forward is None:
            self._forward = self._heads((NO_CACHE, RESIDENT, SWAPPED_OUT), 1)
        return self._forward

    def _forget_the_past(self) -> None:
        if self._known_version != self.version or self._known_now != self.now:
            self._known_version, self._known_now = self.version, self.now
            self._known.clear()
            self._forward = self._swapped_out = self._backward = None

    def _heads(self, states: Sequence[CacheState], sign: int) -> list[_Head]:
        """The first requests (1) or the last (-1) of the lines of these cache states, in the order of a walk."""
        heads: list[_Head] = []
        now, growth, log, lines = self.now, self._growth, math.log, self._lines
        log_weights, leads_s = self._log_weights, self._leads_s
        for state in states:
            for number in self._occupied[state]:
                line = lines[number]
                index = line.first if sign > 0 else len(line.positions) - 1
                log_index = log_weights[number]
                if growth:
                    log_index += growth * log(now - line.requests[index].arrival_s + leads_s[number])
                heads.append((-sign * log_index, sign * line.positions[index], number, index))
        heads.sort()
        return heads

    def _walk(self, heads: list[_Head], sign: int, wanted: Wanted | None) -> Iterator[Request]:
        """The requests of these lines as one, forward (1) or backward (-1); a line that is no longer wanted is left."""
        lines = self._lines
        following: list[_Head] = []
        """Of lines whose head is taken, the next."""
        num_taken, num_heads = 0, len(heads)
        while True:
            follows = bool(following) and (num_taken == num_heads or following[0] < heads[num_taken])
            if follows:
                _, _, number, index = following[0]
            elif num_taken < num_heads:
                _, _, number, index = heads[num_taken]
                num_taken += 1
            else:
                return
            if wanted is not None and not wanted.includes(number % 3):
                if follows:
                    heapq.heappop(following)
                continue
            line = lines[number]
            yield line.requests[index]
            index += sign
            if line.first <= index < len(line.positions):
                key = -sign * self._log_index(line.requests[index], number)
                head = (key, sign * line.positions[index], number, index)
                if follows:
                    heapq.heapreplace(following, head)
                else:
                    heapq.heappush(following, head)
            elif follows:
                heapq.heappop(following)

    # -- the order to come -------------------------------------------------------------------------------------

    def outlook(self, requests: Sequence[Request]) -> Outlook:
        """Whether these requests will come before all others; valid until the queue changes."""
        chosen = set(requests)
        others: list[tuple[int, float]] = []
        for numbers in self._occupied:
            for number in numbers:
                line = self._lines[number]
                for index in range(line.first, len(line.positions)):
                    request = line.requests[index]
                    if request not in chosen:
                        others.append((number, request.arrival_s))
                        break
        lines = [(self._line_of(request), request.arrival_s) for request in requests]
        return Outlook(self._growth, self._log_weights, self._leads_s, lines, others)
