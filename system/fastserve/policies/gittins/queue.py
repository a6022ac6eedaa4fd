"""The order of service by an index that rises with age: requests alike in all but their age share a line.

A request's index is `weight · (age + lead)^growth`. Weight and lead depend on its kind (fixed when it arrives), its
level (its progress) and the state of its cache. Within a line the oldest comes first at any time, so a decision looks
at the heads of the lines only, and a change of weights touches no request.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, CacheState, Request
from fastserve.scheduler.queue import ServiceOrder, Wanted

FIRST_OF_ALL = 0
"""The level of requests that come before all others, in the order in which they got there."""
_FEW = 24
"""Lines that Python sorts sooner than numpy."""
_SLACK = 1e-6
"""numpy's logarithm and Python's may differ in the last digit: heads are taken out by the one, a little early, and
compared by the other."""


_Sorted = tuple[tuple[int, float], list[tuple[float, int]]]
"""Version and time of a sort, and what came of it: bounds and lines."""


class Index(NamedTuple):
    """What the requests of one kind are worth: a row for each level, a column for each cache state."""

    log_weights: np.ndarray
    leads_s: np.ndarray


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
        self._lines: list[list[tuple[int, Request]]] = []
        """By kind, level and cache state, in this order: requests and their positions, in order of these."""
        self._occupied: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        """The lines that hold requests, by cache state."""
        self._log_weights: list[float] = []
        self._leads_s: list[float] = []
        # The same again, to compute with at once, and when the first and the last of each line arrived.
        self._weights = np.empty(0)
        self._leads = np.empty(0)
        self._heads = np.empty(0)
        self._tails = np.empty(0)
        self._forward: _Sorted = (-1, 0.0), []
        self._backward: _Sorted = (-1, 0.0), []

    def add_kind(self) -> None:
        """Add a kind; a request's kind must be known before it joins."""
        lines_of_kind = 3 * self._num_levels
        self._lines += [[] for _ in range(lines_of_kind)]
        self._log_weights += [0.0] * lines_of_kind
        self._leads_s += [0.0] * lines_of_kind
        nothing = np.zeros(lines_of_kind)
        self._weights = np.concatenate((self._weights, nothing))
        self._leads = np.concatenate((self._leads, nothing))
        self._heads = np.concatenate((self._heads, nothing))
        self._tails = np.concatenate((self._tails, nothing))

    def set_index(self, kind: int, index: Index) -> None:
        """Weigh all requests of a kind anew."""
        self.version += 1
        first = 3 * kind * self._num_levels
        rows = slice(first, first + 3 * self._num_levels)
        log_weights = index.log_weights.copy()
        log_weights[FIRST_OF_ALL] = math.inf
        self._weights[rows] = log_weights.ravel()
        self._leads[rows] = index.leads_s.ravel()
        self._log_weights[rows] = self._weights[rows].tolist()
        self._leads_s[rows] = self._leads[rows].tolist()

    def __len__(self) -> int:
        return len(self._entries)

    # -- changes -----------------------------------------------------------------------------------------------

    def join(self, request: Request, level: int) -> None:  # noqa: D102 (as in ServiceOrder; so below)
        self.version += 1
        request.line = request.cache_state
        self.num_swapped_out += request.line == SWAPPED_OUT
        self.now = max(self.now, request.arrival_s)
        self._last_position += 1
        self._entries[request] = 3 * self._num_levels * self._kind_of(request), self._last_position
        request.position = self._last_position
        self._enter(request, level)

    def move(self, request: Request, level: int) -> None:  # noqa: D102
        self.version += 1
        self._leave(request)
        self._enter(request, level)

    def remove(self, request: Request) -> None:  # noqa: D102
        self.version += 1
        self.num_swapped_out -= request.line == SWAPPED_OUT
        self._leave(request)
        del self._entries[request]

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
        if level != FIRST_OF_ALL:
            request.position = self._entries[request][1]
        elif request.level != level:
            self._last_position += 1
            request.position = self._last_position
        request.level = level
        number = self._line_of(request)
        line = self._lines[number]
        if not line:
            self._occupied[request.line].add(number)
        insort(line, (request.position, request))
        self._note_ends(number, line)

    def _leave(self, request: Request) -> None:
        number = self._line_of(request)
        line = self._lines[number]
        del line[bisect_left(line, (request.position,))]
        if line:
            self._note_ends(number, line)
        else:
            self._occupied[request.line].remove(number)

    def _note_ends(self, number: int, line: list[tuple[int, Request]]) -> None:
        self._heads[number] = line[0][1].arrival_s
        self._tails[number] = line[-1][1].arrival_s

    # -- the order ---------------------------------------------------------------------------------------------

    def key(self, request: Request) -> tuple[float, ...]:  # noqa: D102
        return -self._log_index(request, self._line_of(request)), request.position

    def is_before(self, request: Request, other: Request) -> bool:  # noqa: D102
        return self.key(request) < self.key(other)

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
        return self._walk(self._lines_in_order())

    def candidates(self, wanted: Wanted) -> Iterator[Request]:  # noqa: D102
        return self._walk(self._lines_in_order(), wanted)

    def swapped_out(self) -> Iterator[Request]:  # noqa: D102
        return self._walk([line for line in self._lines_in_order() if line[1] % 3 == SWAPPED_OUT])

    def victims(self) -> Iterator[Request]:  # noqa: D102
        if self._backward[0] != (self.version, self.now):
            self._backward = (self.version, self.now), self._sorted((RESIDENT,), self._tails, -1)
        return self._walk(self._backward[1], sign=-1)

    def _lines_in_order(self) -> list[tuple[float, int]]:
        if self._forward[0] != (self.version, self.now):
            self._forward = (self.version, self.now), self._sorted((NO_CACHE, RESIDENT, SWAPPED_OUT), self._heads, 1)
        return self._forward[1]

    def _sorted(self, states: tuple[CacheState, ...], arrivals: np.ndarray, sign: int) -> list[tuple[float, int]]:
        """The lines of these cache states in the order of the returned bounds: of a line, the key of a request that
        arrived at its time in `arrivals`, or a little less."""
        occupied = [number for state in states for number in self._occupied[state]]
        if len(occupied) <= _FEW:
            end = 0 if sign > 0 else -1
            return sorted(
                [(-sign * self._log_index(self._lines[line][end][1], line) - _SLACK, line) for line in occupied]
            )
        numbers = np.array(occupied)
        log_index = self._weights[numbers]
        if self._growth:
            log_index += self._growth * np.log(self.now - arrivals[numbers] + self._leads[numbers])
        bounds = -sign * log_index - _SLACK
        by_bound = np.argsort(bounds, kind="stable")
        return list(zip(bounds[by_bound].tolist(), numbers[by_bound].tolist(), strict=True))

    def _walk(self, lines: list[tuple[float, int]], wanted: Wanted | None = None, sign: int = 1) -> Iterator[Request]:
        """The requests of these lines as one, forward (1) or backward (-1); a line that is no longer wanted is left."""
        heads: list[tuple[float, int, Request, Iterator[tuple[int, Request]], int]] = []
        unopened = iter(lines)
        bound, line = next(unopened, (math.inf, -1))
        while True:
            # Every line that may hold the next request is opened before one is taken.
            while line >= 0 and not (heads and heads[0][0] < bound):
                if wanted is None or _is_wanted(wanted, line % 3):
                    rest = iter(self._lines[line]) if sign > 0 else reversed(self._lines[line])
                    position, request = next(rest)
                    key = -sign * self._log_index(request, line)
                    heapq.heappush(heads, (key, sign * position, request, rest, line))
                bound, line = next(unopened, (math.inf, -1))
            if not heads:
                return
            _, _, request, rest, number = heads[0]
            if wanted is None or _is_wanted(wanted, request.line):
                yield request
                for position, following in rest:
                    key = -sign * self._log_index(following, number)
                    heapq.heapreplace(heads, (key, sign * position, following, rest, number))
                    break
                else:
                    heapq.heappop(heads)
            else:
                heapq.heappop(heads)


def _is_wanted(wanted: Wanted, state: int) -> bool:
    return state == RESIDENT or (wanted.without_cache if state == NO_CACHE else wanted.swapped_out)
