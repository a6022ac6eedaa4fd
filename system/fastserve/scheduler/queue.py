"""The order of service: queues by level, each first in, first out, and in each who has its cache where.

Deciding a batch must not cost the length of the queue. So every level keeps apart those without cache (of whom there
may be a hundred thousand), those on the GPU and those in host memory (of whom there are as many as fit there): the next
to run, to upload or to offload is found at an end, without walking over the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, CacheState, Request


class Gate(Protocol):
    """Who is still looked for in a walk over the queue; may close while it lasts."""

    admitting: bool
    """Those without cache."""
    counting_away: bool
    """Those whose cache is away."""


class ServiceOrder(ABC):
    """What filling a batch and moving caches need of a policy's queue. A walk must be over before it is changed."""

    num_swapped_out: int
    """Requests whose cache is away."""
    version: int
    """Changes whenever the queue does."""

    @abstractmethod
    def key(self, request: Request) -> tuple[float, ...]:
        """Its place in the order: the smaller, the more urgent."""

    @abstractmethod
    def is_before(self, request: Request, other: Request) -> bool:
        """Whether a request comes before another."""

    @abstractmethod
    def fits(self, request: Request, places: int) -> bool:
        """Whether those no less urgent than this request, itself among them, are no more than so many."""

    @abstractmethod
    def put(self, request: Request, part: CacheState) -> None:
        """Its cache has gone elsewhere."""

    @abstractmethod
    def remove(self, request: Request) -> None:
        """Take a request out."""

    @abstractmethod
    def in_order(self) -> Iterator[Request]:
        """Everyone, most urgent first."""

    @abstractmethod
    def candidates(self, gate: Gate) -> Iterator[Request]:
        """Everyone whom the gate lets through, most urgent first."""

    @abstractmethod
    def victims(self) -> Iterator[Request]:
        """Those on the GPU, least urgent first."""

    @abstractmethod
    def swapped_out(self) -> Iterator[Request]:
        """Those whose cache is away, most urgent first."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int, int, int]]:
        """Of each level that has anyone: its number, and how many have no cache, have it on the GPU, have it away."""


class _Line:
    """Requests in order of position. Most join at an end; those put back in their old place are kept beside."""

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
    """One queue: a line for each part, and the number of requests in all."""

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
        """Those of `fix_levels`."""
        self.deepest = 0
        """The least urgent level anyone has been in."""
        self.num_swapped_out = 0
        self.version = 0

    def fix_levels(self, count: int) -> None:
        """Keep levels 0 .. count - 1 although empty. To be called before anyone joins."""
        self._num_fixed_levels = count
        self._in_order = list(range(count))
        self.fixed_levels = [Level() for _ in self._in_order]
        self._levels = dict(enumerate(self.fixed_levels))

    # -- changes -----------------------------------------------------------------------------------------------

    def join(self, request: Request, level: int, *, front: bool = False) -> None:
        """Take a new request in at the back of a level (or its front)."""
        self.version += 1
        self.num_swapped_out += request.cache_state == SWAPPED_OUT
        self._enter(request, level, front)

    def remove(self, request: Request) -> None:  # noqa: D102 (as in ServiceOrder; so below)
        self.version += 1
        self.num_swapped_out -= request.cache_state == SWAPPED_OUT
        self._leave(request)

    def move(self, request: Request, level: int, *, front: bool = False) -> None:
        """Take a request to the back of a level (or its front), be it the one it stands in."""
        self.version += 1
        old, new = self._levels[request.level], self._levels.get(level)
        if front or new is None or old.size == 1:
            self._leave(request)
            self._enter(request, level, front)
            return
        # The same without the calls: at a burst, this is what a simulation spends most of its time on.
        part = request.cache_state
        line = old.lines[part]
        if line.main.pop(request.position, None) is None:
            line.remove(request)
        old.size -= 1
        new.size += 1
        request.level = level
        if level > self.deepest:
            self.deepest = level
        self._last = request.position = position = self._last + 1
        new.lines[part].main[position] = request

    def put(self, request: Request, part: CacheState) -> None:
        """Its cache has gone elsewhere; its place in the order stays."""
        self.version += 1
        self.num_swapped_out += (part == SWAPPED_OUT) - (request.cache_state == SWAPPED_OUT)
        parts = self._levels[request.level].lines
        parts[request.cache_state].remove(request)
        request.cache_state = part
        parts[part].insert(request)

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
            queue.lines[request.cache_state].insert(request)
        else:
            self._last = request.position = position = self._last + 1
            queue.lines[request.cache_state].main[position] = request

    def _leave(self, request: Request) -> None:
        level = request.level
        queue = self._levels[level]
        line = queue.lines[request.cache_state]
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
        """Whether those in its level and the more urgent ones are no more than so many."""
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

    def candidates(self, gate: Gate) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            level = self._levels[number]
            if not level.size:
                continue
            fresh, resident, away = level.lines
            lines = []
            if gate.admitting and fresh:
                lines.append(iter(fresh))
            if gate.counting_away and away:
                lines.append(iter(away))
            if not lines:
                yield from resident
                continue
            if resident:
                lines.append(iter(resident))
            yield from _merged(lines, gate)

    def victims(self) -> Iterator[Request]:  # noqa: D102
        for number in reversed(self._in_order):
            resident = self._levels[number].lines[RESIDENT]
            if resident:
                yield from reversed(resident)

    def swapped_out(self) -> Iterator[Request]:  # noqa: D102
        for number in self._in_order:
            away = self._levels[number].lines[SWAPPED_OUT]
            if away:
                yield from away

    # -- levels that come and go -------------------------------------------------------------------------------

    def _open(self, level: int) -> Level:
        queue = self._levels[level] = self._spare.pop() if self._spare else Level()
        insort(self._in_order, level)
        return queue

    def _close(self, level: int) -> None:
        self._spare.append(self._levels.pop(level))
        del self._in_order[bisect_left(self._in_order, level)]


def _merged(lines: list[Iterator[Request]], gate: Gate | None = None, *, last_first: bool = False) -> Iterator[Request]:
    """Up to three lines as one, by position; a line the gate closes is left."""
    if len(lines) == 1 and gate is None:
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
        # As long as nobody of the others comes before.
        next_of_others = min(heads)[0] if heads else math.inf
        while gate is None or (
            gate.admitting if request.cache_state == NO_CACHE else request.cache_state == RESIDENT or gate.counting_away
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
