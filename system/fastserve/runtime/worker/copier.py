"""Copies of whole cache blocks between the pool on the device and the one in host memory, beside the computation."""

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
"""One is at the link's speed long before, and what else crosses the link waits for a copy under way to end."""


class FinishedCopy(NamedTuple):
    """A copy that has ended, and when it took place, in seconds on the engine's clock."""

    tag: Any
    """What `start` was given."""
    start_s: float
    end_s: float


class _Copy(Protocol):
    def done(self) -> bool:
        """Whether it has ended or failed."""

    def result(self) -> FinishedCopy:
        """Of one that is done; raises what made it fail."""


class BlockCopier(ABC):
    """Copies blocks both ways at a time, and each way one transfer after the other, in the order started.

    No copy waits on the device for the computation, and none has to. What is swapped out is in no iteration in flight
    (I3, I4), so that the last one that wrote its blocks was collected, which is to say waited for, before the copy was
    started; the same goes for what last used the blocks that a copy writes to. And the KVCacheManager gives away
    neither side before the copy has been reported as finished, so that nothing launched later can touch its blocks
    either. An event for copies to wait for, recorded behind the computation before the last, would always have
    happened already; one behind the last would make the copies wait for what they are to run beside.
    """

    def __init__(self) -> None:
        self._in_flight: dict[Direction, deque[_Copy]] = {direction: deque() for direction in Direction}

    @abstractmethod
    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        """Copy block source[i] of the pool it leaves to block destination[i] of the other, for all i. Does not wait."""

    def finished(self) -> list[FinishedCopy]:
        """Copies that have ended since last asked; raises what made one fail. Does not wait."""
        ended = []
        for copies in self._in_flight.values():
            while copies and copies[0].done():
                ended.append(copies.popleft().result())
        return ended

    @abstractmethod
    def wait(self, until: float) -> None:
        """Wait until a copy has ended that was not reported, or the clock reaches `until`. Needs one in flight."""

    @property
    def num_in_flight(self) -> int:
        """Copies not yet reported as finished."""
        return sum(map(len, self._in_flight.values()))

    @abstractmethod
    def close(self) -> None:
        """Wait for all copies, and start no more."""


class ThreadCopier(BlockCopier):
    """For two pools in host memory: a thread each way."""

    def __init__(self, gpu_cache: Tensor, host_cache: Tensor, clock: Clock) -> None:
        super().__init__()
        self._pools = {Direction.OUT: (gpu_cache, host_cache), Direction.IN: (host_cache, gpu_cache)}
        self._clock = clock
        self._threads = {
            direction: ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-copy-{direction.value}")
            for direction in Direction
        }

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        """Have the direction's thread do it."""
        copy = self._threads[direction].submit(self._copy, direction, source, destination, tag)
        self._in_flight[direction].append(copy)

    def wait(self, until: float) -> None:
        """Wait for the threads."""
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
    """For a pool on a GPU and one in page-locked memory: a stream each way, and no thread.

    What was written into the pools before it is made will be seen by its copies, on whatever stream it was.
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
        # Nothing is ever queued on that stream, so its event happens now: the device's time for `anchored_s`.
        copy.anchor.record(self._idle_stream)
        copy.started.record(stream)
        with torch.cuda.stream(stream):
            copy_blocks(*self._pools[direction], source, destination)
        copy.ended.record(stream)
        self._in_flight[direction].append(copy)

    def wait(self, until: float) -> None:
        """Look every few microseconds."""
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
    """A copier between two pools of blocks of one shape: `[num_blocks, ...]`, contiguous.

    A `host_cache` beside one on a GPU is page-locked (`worker.memory.pinned_zeros`), or the copies would not run
    beside anything.
    """
    kind = StreamCopier if gpu_cache.is_cuda else ThreadCopier
    return kind(gpu_cache, host_cache, clock)


@torch.inference_mode()  # In a thread of its own too, where pools made under it could not be written otherwise.
def copy_blocks(
    source_pool: Tensor, destination_pool: Tensor, source: Sequence[int], destination: Sequence[int]
) -> None:
    """Copy blocks, with a GPU: queue that on the current stream. Neighbours in both pools are copied together.

    ValueError, IndexError or RuntimeError for blocks that do not pair up or that a pool has not.
    """
    block_bytes = source_pool.stride(0) * source_pool.element_size()
    for origin, target, count in runs(source, destination, max(1, _LARGEST_COPY_BYTES // block_bytes)):
        destination_pool.narrow(0, target, count).copy_(source_pool.narrow(0, origin, count), non_blocking=True)


def runs(source: Sequence[int], destination: Sequence[int], longest: int) -> list[tuple[int, int, int]]:
    """Pairs of blocks as spans of at most `longest` neighbours in both pools: first source, first destination, number.

    ValueError if there is not one destination for each source.
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
    """When on the clock an event happened, `elapsed_ms` on the device after one that happened at `anchored_s`.

    Never before that or after `now_s`: a few microseconds lie between reading the clock and the anchor's event, and
    the clock may have been stopped since.
    """
    return min(max(anchored_s, anchored_s + elapsed_ms / 1e3), now_s)
