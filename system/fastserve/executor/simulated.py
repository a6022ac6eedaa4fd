"""SimulatedExecutor: iterations and transfers take the time a model says, under a virtual clock."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np

from fastserve.clock import VirtualClock
from fastserve.executor.base import Executor, FinishedTransfer, IterationResult
from fastserve.kvcache import Direction
from fastserve.latency import HostLink, LatencyModel, StageLink, decode_times
from fastserve.scheduler.iteration import Iteration


class SimulatedExecutor(Executor):
    """The stages of the pipeline, the links between them and the two directions of the host link work side by side.

    Each of them does one thing at a time, in the order submitted: a stage an iteration, for the time `stage` says; a
    stage link the activations of one iteration; a direction of the host link one transfer, at its bandwidth after its
    latency. Every GPU has a host link of its own for its part of a cache, and all parts of one move alike, so they are
    priced as one transfer over `host_link`, which is the sum of those links.
    """

    def __init__(
        self,
        stage: LatencyModel,
        host_link: HostLink,
        clock: VirtualClock,
        *,
        num_stages: int = 1,
        stage_link: StageLink | None = None,
    ) -> None:
        self.max_in_flight = num_stages
        self._stage = stage
        self._host_link = host_link
        self._stage_link = stage_link
        self._clock = clock
        self._first_stage_free_at = 0.0
        self._later_stages_free_at = [0.0] * (num_stages - 1)
        self._stage_links_free_at = [0.0] * (num_stages - 1)
        self._computing: deque[IterationResult] = deque()
        self._transfers: list[tuple[float, int, FinishedTransfer]] = []
        self._num_transfers = 0
        self._direction_free_at = {Direction.OUT: 0.0, Direction.IN: 0.0}

    @property
    def can_submit(self) -> bool:
        """Whether the first stage has ended the last iteration submitted."""
        return self._first_stage_free_at <= self._clock.now()

    @property
    def can_collect(self) -> bool:
        """Whether the end of the oldest iteration lies in the past."""
        return bool(self._computing) and self._computing[0].end_s <= self._clock.now()

    def submit(self, iteration: Iteration) -> None:
        """Price the iteration and its transfers."""
        now = self._clock.now()
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            start = max(now, self._direction_free_at[transfer.direction])
            end = start + self._host_link.transfer_time(transfer.num_bytes)
            self._direction_free_at[transfer.direction] = end
            self._num_transfers += 1
            heapq.heappush(self._transfers, (end, self._num_transfers, FinishedTransfer(transfer, start, end)))
        if iteration.requests:
            duration = self._duration(iteration)
            end = self._first_stage_free_at = now + duration
            if self._later_stages_free_at:
                end = self._through_later_stages(iteration, end, duration)
            self._computing.append(IterationResult((0,) * len(iteration.requests), now, end))

    def _through_later_stages(self, iteration: Iteration, end: float, duration: float) -> float:
        """When the last stage ends an iteration that takes `duration` in each, and that the first ends at `end`."""
        num_tokens = iteration.num_scheduled_tokens
        sending = 0.0
        if self._stage_link is not None:
            num_sent = max(num_tokens) * len(num_tokens) if iteration.padded else sum(num_tokens)
            sending = self._stage_link.transfer_time(num_sent)
        stages_free_at, links_free_at = self._later_stages_free_at, self._stage_links_free_at
        for i, stage_free_at in enumerate(stages_free_at):
            arrived = links_free_at[i] = max(end, links_free_at[i]) + sending
            end = stages_free_at[i] = max(arrived, stage_free_at) + duration
        return end

    def _duration(self, iteration: Iteration) -> float:
        if sum(iteration.num_scheduled_tokens) == len(iteration.requests) and not iteration.padded:
            context_lens = [request.num_computed_tokens + 1 for request in iteration.requests]
            if min(context_lens) > 1:  # All decode.
                return self._stage.iteration_time((), context_lens)
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
            return self._stage.iteration_time(prefill_lens, context_lens, prefix_lens)
        return self._stage.iteration_time(prefill_lens, context_lens)

    def foresee(self, iteration: Iteration, count: int, until: float) -> np.ndarray | None:
        """One after the other without a gap, as `submit` would price them."""
        if self._computing or iteration.padded or self.max_in_flight > 1:
            return None
        durations = decode_times(self._stage, [request.num_tokens for request in iteration.requests], count)
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
        """Jump to whatever is next."""
        if self._transfers:
            until = min(until, self._transfers[0][0])
        if self._computing:
            until = min(until, self._computing[0].end_s)
            if self._first_stage_free_at > self._clock.now():
                until = min(until, self._first_stage_free_at)
        self._clock.sleep_until(until)

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
