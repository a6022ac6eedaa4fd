"""SimulatedExecutor: iterations and transfers take the time a model says, under a virtual clock."""

from __future__ import annotations

import heapq
from collections import deque

from fastserve.clock import VirtualClock
from fastserve.executor.base import Executor, IterationResult
from fastserve.kvcache import Direction, Transfer
from fastserve.latency import HostLink, LatencyModel
from fastserve.scheduler.iteration import Iteration


class SimulatedExecutor(Executor):
    """Computation and the two directions of the host link are three resources that work side by side.

    Each direction carries one transfer at a time, in the order submitted, at the link's bandwidth after its latency.
    """

    def __init__(self, latency: LatencyModel, link: HostLink, clock: VirtualClock) -> None:
        self._latency = latency
        self._link = link
        self._clock = clock
        self._computing: deque[IterationResult] = deque()
        self._transfers: list[tuple[float, int, Transfer]] = []
        self._num_transfers = 0
        self._direction_free_at = {Direction.OUT: 0.0, Direction.IN: 0.0}

    def submit(self, iteration: Iteration) -> None:
        """Price the iteration and its transfers."""
        now = self._clock.now()
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            end = max(now, self._direction_free_at[transfer.direction]) + self._link.transfer_time(transfer.num_bytes)
            self._direction_free_at[transfer.direction] = end
            self._num_transfers += 1
            heapq.heappush(self._transfers, (end, self._num_transfers, transfer))
        if iteration.requests:
            prefill_lens = []
            context_lens = []
            for request, num_scheduled in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
                if num_scheduled == 1 and request.num_computed_tokens:
                    context_lens.append(request.num_tokens)
                else:
                    prefill_lens.append(num_scheduled)
            duration = self._latency.iteration_time(prefill_lens, context_lens)
            self._computing.append(IterationResult((0,) * len(iteration.requests), now, now + duration))

    def collect(self) -> IterationResult:
        """Jump to the end of the oldest iteration."""
        result = self._computing.popleft()
        self._clock.sleep_until(result.end_s)
        return result

    def wait(self, until: float) -> None:
        """Jump to the end of the next transfer, or to `until`."""
        self._clock.sleep_until(min(until, self._transfers[0][0]) if self._transfers else until)

    def finished_transfers(self) -> list[Transfer]:
        """Transfers whose end lies in the past, in the order they ended."""
        finished = []
        now = self._clock.now()
        while self._transfers and self._transfers[0][0] <= now:
            finished.append(heapq.heappop(self._transfers)[2])
        return finished

    @property
    def num_transfers_in_flight(self) -> int:
        """Transfers that have not been reported as finished."""
        return len(self._transfers)
