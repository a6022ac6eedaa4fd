"""The order of service: queues by level, each first in, first out, with a line for each cache state.

A decision must not cost the length of the queue. So every level keeps three lines: requests without a cache (there may
be a hundred thousand), on the GPU, and swapped out. The next to run, to swap in or to swap out is found at an end of a
line, without a walk over the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Request


class Wanted:
    """Which requests a walk yields besides those on the GPU; the caller may narrow this during the walk."""

    __slots__ = ("swapped_out", "without_cache")

    def __init__(self, without_cache: bool, swapped_out: bool) -> None:
        self.without_cache = without_cache
        self.swapped_out = swapped_out


class ServiceOrder(ABC):
    """What filling a batch and moving caches need of a policy's queue.

    A walk must end before the queue is changed. A cache may change its state during a walk: the queue follows when it
    is told (`refile`).
    """

    num_swapped_out: int
    """Requests in the lines for swapped-out caches."""
    version: int
    """Changes whenever the queue does."""

    @abstractmethod
    def join(self, request: Request, level: int) -> None:
        """Take in a new request at the back of a level."""

    @abstractmethod
    def move(self, request: Request, level: int) -> None:
        """Move a request to the back of a level, be it its own."""

    @abstractmethod
    def remove(self, request: Request) -> None:
        """Take a request out."""

    @abstractmethod
    def refile(self, request: Request) -> None:
        """Follow `request.cache_state`, which has changed."""

    @abstractmethod
    def key(self, request: Request) -> tuple[float, ...]:
        """Its place in the order: the smaller, the more urgent."""

    @abstractmethod
    def is_before(self, request: Request, other: Request) -> bool:
        """Whether a request comes before another."""

    @abstractmethod
    def fits(self, request: Request, places: int) -> bool:
        """Whether the requests in its level and above, itself among them, are no more than `places`."""

    @abstractmethod
    def in_order(self) -> Iterator[Request]:
        """All requests, most urgent first."""

    @abstractmethod
    def candidates(self, wanted: Wanted) -> Iterator[Request]:
        """The wanted requests, most urgent first."""

    @abstractmethod
    def victims(self) -> Iterator[Request]:
        """Requests on the GPU, least urgent first."""

    @abstractmethod
    def swapped_out(self) -> Iterator[Request]:
        """Requests that are swapped out, most urgent first."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int, int, int]]:
        """Of each level with requests: its number, and how many have no cache, are on the GPU, are swapped out."""


class _Line:
    """Requests in order of position. Most join at an end; requests that return to their place are kept beside."""

    __slots__ = ("main", "put_back")

    def __init__(self) -> None:
        self.main: OrderedDict[int, Request] = OrderedDict()
        self.put_back: list[tuple[int, Request]] = []

    def __bool__(self) -> bool:
        return bool(self.main or self.put_back)

    def __len__(self) -> int:
        return len(self.main) + len(self.put_back)

    def insert(self, request: Request) -> None:
        position = request.position
        main = self.main
        if not main or position > next(reversed(main)):
            main[position] = request
        elif position < next(iter(main)):
            main[position] = request
            main.move_to_end(position, last=False)
        else:
            insort(self.put_back, (position, request))

    def remove(self, request: Request) -> None:
        if self.main.pop(request.position, None) is None:
            index = bisect_left(self.put_back, (request.position,))
            assert self.put_back[index][1] is request
            del self.put_back[index]

    def __iter__(self) -> Iterator[Request]:
        if not self.put_back:
            return iter(self.main.values())
        if not self.main:
            return (request for _, request in self.put_back)
        return _merged([iter(self.main.values()), (request for _, request in self.put_back)])

    def __reversed__(self) -> Iterator[Request]:
        if not self.put_back:
            return reversed(self.main.values())
        backwards = (request for _, request in reversed(self.put_back))
        return _merged([reversed(self.main.values()), backwards], last_first=True)


class Level:
    """One queue: a line for each cache state, and the number of requests in all."""

    __slots__ = ("lines", "size")

    def __init__(self) -> None:
        self.lines = (_Line(), _Line(), _Line())
        self.size = 0


class MultiLevelQueue(ServiceOrder):
    """Requests by level (any integer, smaller is more urgent), within a level by position.

    Levels come and go with their requests, unless fixed.
    """

    def __init__(self) -> None:
        self._levels: dict[int, Level] = {}
        self._in_order: list[int] = []
        self._num_fixed_levels = 0
        self._spare: list[Level] = []
        self._last = 0
        self._first = 0
        self.fixed_levels: list[Level] = []
        """The levels of `fix_levels`."""
        self.deepest = 0
        """The least urgent level that has held a request."""
        self.num_swapped_out = 0
        self.version = 0

    def fix_levels(self, count: int) -> None:
        """Keep levels 0 .. count - 1 although empty. Call it before the first request joins."""
        self._num_fixed_levels = count
        self._in_order = list(range(count))
        self.fixed_levels = [Level() for _ in self._in_order]
        self._levels = dict(enumerate(self.fixed_levels))

    # -- changes -----------------------------------------------------------------------------------------------

    def join(self, request: Request, level: int, *, front: bool = False) -> None:
        """Take in a new request at the back of a level (or its front)."""
        self.version += 1
        request.line = request.cache_state
        self.num_swapped_out += request.line == SWAPPED_OUT
        self._enter(request, level, front)

    def remove(self, request: Request) -> None:  # noqa: D102 (as in ServiceOrder; so below)
        self.version += 1
        self.num_swapped_out -= request.line == SWAPPED_OUT
        self._leave(request)

    def move(self, request: Request, level: int, *, front: bool = False) -> None:
        """Move a request to the back of a level (or its front), be it its own."""
        self.version += 1
        old, new = self._levels[request.level], self._levels.get(level)
        if front or new is None or old.size == 1:
            self._leave(request)
            self._enter(request, level, front)
            return
        # The same without the calls: at a burst, this is what a simulation spends most of its time on.
        state = request.line
        line = old.lines[state]
        if line.main.pop(request.position, None) is None:
            line.remove(request)
        old.size -= 1
        new.size += 1
        request.level = level
        if level > self.deepest:
            self.deepest = level
        self._last = request.position = position = self._last + 1
        new.lines[state].main[position] = request

    def refile(self, request: Request) -> None:  # noqa: D102
        state = request.cache_state
        self.version += 1
        self.num_swapped_out += (state == SWAPPED_OUT) - (request.line == SWAPPED_OUT)
        lines = self._levels[request.level].lines
        lines[request.line].remove(request)
        request.line = state
        lines[state].insert(request)

    def _enter(self, request: Request, level: int, front: bool) -> None:
        queue = self._levels.get(level)
        if queue is None:
            queue = self._open(level)
        queue.size += 1
        request.level = level
        if level > self.deepest:
            self.deepest = level
        if front:
            self._first = request.position = self._first - 1
            queue.lines[request.line].insert(request)
        else:
            self._last = request.position = position = self._last + 1
            queue.lines[request.line].main[position] = request

    def _leave(self, request: Request) -> None:
        level = request.level
        queue = self._levels[level]
        line = queue.lines[request.line]
        if line.main.pop(request.position, None) is None:
            line.remove(request)
        queue.size -= 1
        if not queue.size and not 0 <= level < self._num_fixed_levels:
            self._close(level)

    # -- the order ---------------------------------------------------------------------------------------------

    def key(self, request: Request) -> tuple[float, ...]:  # noqa: D102
        return request.level, request.position

    def is_before(self, request: Request, other: Request) -> bool:  # noqa: D102
        return request.level < other.level or (request.level == other.level and request.position < other.position)

    def fits(self, request: Request, places: int) -> bool:
        """As in ServiceOrder, counted level by level."""
        for number in self._in_order:
            if number > request.level or places < 0:
                break
            places -= self._levels[number].size
        return places >= 0

    def sizes(self) -> list[tuple[int, int, int, int]]:  # noqa: D102
        levels = ((number, self._levels[number]) for number in self._in_order)
        return [(number, *map(len, level.lines)) for number, level in levels if level.size]  # type: ignore[misc]

    # -- walks -------------------------------------------------------------------------------------------------

    def in_order(self) -> Iterator[Request]:  # noqa: D102
        for level in self._in_order:
            yield from _merged([iter(line) for line in self._levels[level].lines])

    def candidates(self, wanted: Wanted) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            level = self._levels[number]
            if not level.size:
                continue
            without_cache, resident, swapped_out = level.lines
            lines = []
            if wanted.without_cache and without_cache:
                lines.append(iter(without_cache))
            if wanted.swapped_out and swapped_out:
                lines.append(iter(swapped_out))
            if not lines:
                yield from resident
                continue
            if resident:
                lines.append(iter(resident))
            yield from _merged(lines, wanted)

    def victims(self) -> Iterator[Request]:  # noqa: D102
        for number in reversed(self._in_order):
            resident = self._levels[number].lines[RESIDENT]
            if resident:
                yield from reversed(resident)

    def swapped_out(self) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            line = self._levels[number].lines[SWAPPED_OUT]
            if line:
                yield from line

    # -- levels that come and go -------------------------------------------------------------------------------

    def _open(self, level: int) -> Level:
        queue = self._levels[level] = self._spare.pop() if self._spare else Level()
        insort(self._in_order, level)
        return queue

    def _close(self, level: int) -> None:
        self._spare.append(self._levels.pop(level))
        del self._in_order[bisect_left(self._in_order, level)]


def _merged(
    lines: list[Iterator[Request]], wanted: Wanted | None = None, *, last_first: bool = False
) -> Iterator[Request]:
    """Up to three lines as one, by position; a line that is no longer wanted is left."""
    if len(lines) == 1 and wanted is None:
        yield from lines[0]
        return
    sign = -1 if last_first else 1
    heads: list[tuple[int, Request, Iterator[Request]]] = []
    for line in lines:
        for request in line:
            heads.append((sign * request.position, request, line))
            break
    while heads:
        head = min(heads)
        heads.remove(head)
        _, request, line = head
        # As long as no request of the other lines comes before.
        next_of_others = min(heads)[0] if heads else math.inf
        while wanted is None or (
            wanted.without_cache if request.line == NO_CACHE else request.line == RESIDENT or wanted.swapped_out
        ):
            yield request
            following = next(line, None)
            if following is None:
                break
            request = following
            key = sign * request.position
            if key > next_of_others:
                heads.append((key, request, line))
                break
