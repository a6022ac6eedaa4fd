"""Copy cache blocks between the pool on the device and the pool in host memory, during the computation."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastserve.core.clock import Clock
from fastserve.kvcache import Direction

_POLL_S = 20e-6
_LARGEST_COPY_BYTES = 32 * 2**20
"""Such a copy is long enough for full bandwidth; other use of the link waits until it ends."""


class FinishedCopy(NamedTuple):
    """A copy that has ended, with its times in seconds on the engine's clock."""

    tag: Any
    """The tag given to `start`."""
    start_s: float
    end_s: float


class _Copy(Protocol):
    def done(self) -> bool:
        """Whether the copy has ended or failed."""

    def result(self) -> FinishedCopy:
        """The ended copy; raises the error of a failed one."""


class BlockCopier(ABC):
    """Copies blocks in both directions at once; in each direction one transfer after the other, in the order started.

    Copies never wait on the device for the computation, for two reasons:

    - The blocks of a copy are in no iteration in flight (I3, I4). So the iteration that used them last was collected,
      and has ended, before the copy is started.
    - The KVCacheManager reuses neither side's blocks before the copy has been reported as finished. So no later
      iteration touches them either.
    """

    def __init__(self) -> None:
        self._in_flight: dict[Direction, deque[_Copy]] = {direction: deque() for direction in Direction}

    @abstractmethod
    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        """Start copying block source[i] of one pool to block destination[i] of the other, for all i."""

    def finished(self) -> list[FinishedCopy]:
        """Copies that have ended since the last call; raises the error of a copy that failed. Does not wait."""
        ended = []
        for copies in self._in_flight.values():
            while copies and copies[0].done():
                ended.append(copies.popleft().result())
        return ended

    @abstractmethod
    def wait(self, until: float) -> None:
        """Wait until a copy in flight has ended or the clock reaches `until` (seconds). Needs a copy in flight."""

    @property
    def num_in_flight(self) -> int:
        """Copies not yet returned by `finished`."""
        return sum(map(len, self._in_flight.values()))

    @abstractmethod
    def close(self) -> None:
        """Wait for all copies; no more can be started."""


class ThreadCopier(BlockCopier):
    """For two pools in host memory: one thread for each direction."""

    def __init__(self, gpu_cache: Tensor, host_cache: Tensor, clock: Clock) -> None:
        super().__init__()
        self._pools = {Direction.OUT: (gpu_cache, host_cache), Direction.IN: (host_cache, gpu_cache)}
        self._clock = clock
        self._threads = {
            direction: ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-copy-{direction.value}")
            for direction in Direction
        }

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        """Queue the copy for the direction's thread."""
        copy = self._threads[direction].submit(self._copy, direction, source, destination, tag)
        self._in_flight[direction].append(copy)

    def wait(self, until: float) -> None:
        """Wait for the oldest copy of either direction."""
        timeout = None if math.isinf(until) else max(0.0, until - self._clock.now())
        oldest = [copies[0] for copies in self._in_flight.values() if copies]
        wait(oldest, timeout, FIRST_COMPLETED)  # type: ignore[arg-type]  # They are futures.

    def close(self) -> None:
        """Stop the threads."""
        for thread in self._threads.values():
            thread.shutdown()

    def _copy(
        self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object
    ) -> FinishedCopy:
        start = self._clock.now()
        copy_blocks(*self._pools[direction], source, destination)
        return FinishedCopy(tag, start, self._clock.now())


class StreamCopier(BlockCopier):
    """For a pool on a GPU and a pool in page-locked memory: one stream for each direction, no threads.

    Its copies see everything that any stream wrote to the pools before the copier was made.
    """

    def __init__(self, gpu_cache: Tensor, host_cache: Tensor, clock: Clock) -> None:
        super().__init__()
        self._pools = {Direction.OUT: (gpu_cache, host_cache), Direction.IN: (host_cache, gpu_cache)}
        self._clock = clock
        device = gpu_cache.device
        self._streams = {direction: torch.cuda.Stream(device) for direction in Direction}
        self._idle_stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        """Queue the copies on the direction's stream, between two events."""
        stream = self._streams[direction]
        copy = _StreamCopy(tag, self._clock)
        # This stream is always idle, so its event happens now: the device's time of `anchored_s`.
        copy.anchor.record(self._idle_stream)
        copy.started.record(stream)
        with torch.cuda.stream(stream):
            copy_blocks(*self._pools[direction], source, destination)
        copy.ended.record(stream)
        self._in_flight[direction].append(copy)

    def wait(self, until: float) -> None:
        """Poll every few microseconds."""
        while not any(copies[0].done() for copies in self._in_flight.values() if copies):
            if self._clock.now() >= until:
                return
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Wait for the streams."""
        for stream in self._streams.values():
            stream.synchronize()


class _StreamCopy:
    """A transfer on a stream."""

    def __init__(self, tag: object, clock: Clock) -> None:
        self._tag = tag
        self._clock = clock
        self.anchor, self.started, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self._anchored_s = clock.now()

    def done(self) -> bool:
        return bool(self.ended.query() and self.anchor.query())

    def result(self) -> FinishedCopy:
        now = self._clock.now()
        start, end = (
            time_of(self.anchor.elapsed_time(event), self._anchored_s, now) for event in (self.started, self.ended)
        )
        return FinishedCopy(self._tag, start, end)


def make_copier(gpu_cache: Tensor, host_cache: Tensor, clock: Clock) -> BlockCopier:
    """A copier between two contiguous pools, `[num_blocks, ...]`, whose blocks have the same shape.

    With a pool on a GPU, `host_cache` must be page-locked (`worker.memory.pinned_zeros`), or copies block the host.
    """
    kind = StreamCopier if gpu_cache.is_cuda else ThreadCopier
    return kind(gpu_cache, host_cache, clock)


@torch.inference_mode()  # Pools are made in inference mode; other threads need it to write to them.
def copy_blocks(
    source_pool: Tensor, destination_pool: Tensor, source: Sequence[int], destination: Sequence[int]
) -> None:
    """Copy blocks; with a GPU, queue the copies on the current stream. Neighbours in both pools are copied together.

    Raises ValueError, IndexError or RuntimeError for blocks that do not pair up or do not exist.
    """
    block_bytes = source_pool.stride(0) * source_pool.element_size()
    for origin, target, count in runs(source, destination, max(1, _LARGEST_COPY_BYTES // block_bytes)):
        destination_pool.narrow(0, target, count).copy_(source_pool.narrow(0, origin, count), non_blocking=True)


def runs(source: Sequence[int], destination: Sequence[int], longest: int) -> list[tuple[int, int, int]]:
    """Group pairs of blocks into spans of at most `longest` neighbours in both pools.

    Returns the first source, first destination and number of blocks of each span. ValueError if the lengths differ.
    """
    found: list[tuple[int, int, int]] = []
    for origin, target in sorted(zip(source, destination, strict=True)):
        if found:
            first_origin, first_target, count = found[-1]
            if count < longest and (origin, target) == (first_origin + count, first_target + count):
                found[-1] = (first_origin, first_target, count + 1)
                continue
        found.append((origin, target, 1))
    return found


def time_of(elapsed_ms: float, anchored_s: float, now_s: float) -> float:
    """Time (s) on the clock of a device event that happened `elapsed_ms` after an event at `anchored_s`.

    Never before `anchored_s` or after `now_s`: the anchor's event happens microseconds after the clock is read, and the
    clock may have been stopped since.
    """
    return min(max(anchored_s, anchored_s + elapsed_ms / 1e3), now_s)
