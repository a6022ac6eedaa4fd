"""SimulatedExecutor: iterations and transfers take the time a model says, under a virtual clock."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np

from fastserve.clock import VirtualClock
from fastserve.executor.base import Executor, FinishedTransfer, IterationResult
from fastserve.kvcache import Direction
from fastserve.latency import HostLink, LatencyModel, decode_times
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
        self._transfers: list[tuple[float, int, FinishedTransfer]] = []
        self._num_transfers = 0
        self._direction_free_at = {Direction.OUT: 0.0, Direction.IN: 0.0}

    def submit(self, iteration: Iteration) -> None:
        """Price the iteration and its transfers."""
        now = self._clock.now()
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            start = max(now, self._direction_free_at[transfer.direction])
            end = start + self._link.transfer_time(transfer.num_bytes)
            self._direction_free_at[transfer.direction] = end
            self._num_transfers += 1
            heapq.heappush(self._transfers, (end, self._num_transfers, FinishedTransfer(transfer, start, end)))
        if iteration.requests:
            end = now + self._duration(iteration)
            self._computing.append(IterationResult((0,) * len(iteration.requests), now, end))

    def _duration(self, iteration: Iteration) -> float:
        if sum(iteration.num_scheduled_tokens) == len(iteration.requests) and not iteration.padded:
            context_lens = [request.num_computed_tokens + 1 for request in iteration.requests]
            if min(context_lens) > 1:  # All decode.
                return self._latency.iteration_time((), context_lens)
        prefill_lens, prefix_lens, context_lens = [], [], []
        for request, num_scheduled in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            num_computed = request.num_computed_tokens
            if num_scheduled <= 1 and num_computed:
                context_lens.append(num_computed + num_scheduled)
            else:
                prefill_lens.append(num_scheduled)
                prefix_lens.append(num_computed)
        if iteration.padded:
            prefill_lens = [max(prefill_lens)] * len(prefill_lens) if prefill_lens else prefill_lens
            context_lens = [max(context_lens)] * len(context_lens) if context_lens else context_lens
        if any(prefix_lens):
            return self._latency.iteration_time(prefill_lens, context_lens, prefix_lens)
        return self._latency.iteration_time(prefill_lens, context_lens)

    def foresee(self, iteration: Iteration, count: int, until: float) -> np.ndarray | None:
        """One after the other without a gap, as `submit` would price them."""
        if self._computing or iteration.padded:
            return None
        durations = decode_times(self._latency, [request.num_tokens for request in iteration.requests], count)
        if self._transfers:
            until = min(until, self._transfers[0][0])
        ends = np.add.accumulate(np.concatenate(([self._clock.now()], durations)))
        # Iteration k starts at ends[k].
        return ends[1 : 1 + int(np.searchsorted(ends[:-1], until, side="left"))]

    def collect(self) -> IterationResult:
        """Jump to the end of the oldest iteration."""
        result = self._computing.popleft()
        self._clock.sleep_until(result.end_s)
        return result

    def wait(self, until: float) -> None:
        """Jump to the end of the next transfer, or to `until`."""
        self._clock.sleep_until(min(until, self._transfers[0][0]) if self._transfers else until)

    def finished_transfers(self) -> list[FinishedTransfer]:
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
