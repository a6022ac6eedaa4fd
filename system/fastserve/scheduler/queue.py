"""The order of service: queues by level, each first in, first out, with a line for each cache state.

A decision must not cost the length of the queue. So every level keeps three lines: requests without a cache (there may
be a hundred thousand), on the GPU, and swapped out. The next to run, to swap in or to swap out is found at an end of a
line, without a walk over the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Request


class Wanted:
    """Which requests a walk yields besides those on the GPU; the caller may narrow this during the walk."""

    __slots__ = ("swapped_out", "without_cache")

    def __init__(self, without_cache: bool, swapped_out: bool) -> None:
        self.without_cache = without_cache
        self.swapped_out = swapped_out

    def includes(self, state: int) -> bool:
        """Whether requests in this line are wanted."""
        return state == RESIDENT or (self.without_cache if state == NO_CACHE else self.swapped_out)


@mypyc_attr(allow_interpreted_subclasses=True)
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


class Line:
    """Requests in order of position. Most join at an end; requests that return to their place are kept beside.

    The former are linked (`Request.previous`, `Request.next`), so that joining and leaving allocate nothing.
    """

    __slots__ = ("first", "last", "put_back", "size")

    def __init__(self) -> None:
        self.first: Request | None = None
        self.last: Request | None = None
        self.put_back: list[tuple[int, Request]] = []
        self.size = 0

    def append(self, request: Request) -> None:
        """Take in a request behind all others."""
        last = self.last
        if last is None:
            self.first = request
        else:
            last.next = request
            request.previous = last
        self.last = request
        self.size += 1

    def insert(self, request: Request) -> None:
        """Take in a request at its position."""
        first, last = self.first, self.last
        if first is None or last is None or request.position > last.position:
            self.append(request)
        elif request.position < first.position:
            first.previous = request
            request.next = first
            self.first = request
            self.size += 1
        else:
            request.is_put_back = True
            insort(self.put_back, (request.position, request))
            self.size += 1

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self.size -= 1
        if request.is_put_back:
            request.is_put_back = False
            del self.put_back[bisect_left(self.put_back, (request.position,))]
            return
        previous, following = request.previous, request.next
        if previous is None:
            self.first = following
        else:
            previous.next = following
            request.previous = None
        if following is None:
            self.last = previous
        else:
            following.previous = previous
            request.next = None

    def forward(self) -> Iterator[Request]:
        """By rising position."""
        return _merged([self._linked(), _second(self.put_back)], None, 1) if self.put_back else self._linked()

    def backward(self) -> Iterator[Request]:
        """By falling position."""
        if self.put_back:
            return _merged([self._linked_backward(), _second(self.put_back[::-1])], None, -1)
        return self._linked_backward()

    def _linked(self) -> Iterator[Request]:
        request = self.first
        while request is not None:
            yield request
            request = request.next

    def _linked_backward(self) -> Iterator[Request]:
        request = self.last
        while request is not None:
            yield request
            request = request.previous


class Level:
    """One queue: a line for each cache state, and the number of requests in all."""

    __slots__ = ("lines", "size")

    def __init__(self) -> None:
        self.lines = (Line(), Line(), Line())
        self.size = 0


@mypyc_attr(allow_interpreted_subclasses=True)
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
        self._leave(request)
        self._enter(request, level, front)

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
            self._first -= 1
            request.position = self._first
            queue.lines[request.line].insert(request)
        else:
            self._last += 1
            request.position = self._last
            queue.lines[request.line].append(request)

    def _leave(self, request: Request) -> None:
        level = request.level
        queue = self._levels[level]
        queue.lines[request.line].remove(request)
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
        return [(number, *[line.size for line in level.lines]) for number, level in levels if level.size]  # type: ignore[misc]

    # -- walks -------------------------------------------------------------------------------------------------

    def in_order(self) -> Iterator[Request]:  # noqa: D102
        return self.candidates(Wanted(True, True))

    def candidates(self, wanted: Wanted) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            level = self._levels[number]
            if not level.size:
                continue
            without_cache, on_gpu, off_gpu = level.lines
            if without_cache.put_back or on_gpu.put_back or off_gpu.put_back:
                yield from _merged([line.forward() for line in level.lines], wanted, 1)
                continue
            waiting, resident, away = without_cache.first, on_gpu.first, off_gpu.first
            # The frontmost of the three heads, until no line that is wanted has one.
            while True:
                request = resident
                if waiting is not None:
                    if not wanted.without_cache:
                        waiting = None
                    elif request is None or waiting.position < request.position:
                        request = waiting
                if away is not None:
                    if not wanted.swapped_out:
                        away = None
                    elif request is None or away.position < request.position:
                        request = away
                if request is None:
                    break
                yield request
                if request is resident:
                    resident = request.next
                elif request is waiting:
                    waiting = request.next
                else:
                    away = request.next

    def victims(self) -> Iterator[Request]:  # noqa: D102
        for number in reversed(self._in_order):
            resident = self._levels[number].lines[RESIDENT]
            if resident.size:
                yield from resident.backward()

    def swapped_out(self) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            away = self._levels[number].lines[SWAPPED_OUT]
            if away.size:
                yield from away.forward()

    # -- levels that come and go -------------------------------------------------------------------------------

    def _open(self, level: int) -> Level:
        queue = self._levels[level] = self._spare.pop() if self._spare else Level()
        insort(self._in_order, level)
        return queue

    def _close(self, level: int) -> None:
        self._spare.append(self._levels.pop(level))
        del self._in_order[bisect_left(self._in_order, level)]


def _second(pairs: list[tuple[int, Request]]) -> Iterator[Request]:
    for _, request in pairs:
        yield request


def _merged(lines: list[Iterator[Request]], wanted: Wanted | None, sign: int) -> Iterator[Request]:
    """Several lines as one, by rising (1) or falling (-1) position; a line that is no longer wanted is left."""
    heads: list[tuple[int, Request, Iterator[Request]]] = []
    for line in lines:
        for request in line:
            heads.append((sign * request.position, request, line))
            break
    while heads:
        head = min(heads)
        heads.remove(head)
        _, request, line = head
        if wanted is None or wanted.includes(request.line):
            yield request
            for following in line:
                heads.append((sign * following.position, following, line))
                break
