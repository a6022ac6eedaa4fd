"""SimulatedExecutor: iterations and transfers take the time that a latency model says; nothing is computed."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from fastserve.core.clock import Clock
from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import Request, SamplingParams
from fastserve.engine.executor import Executor, FinishedTransfer
from fastserve.kvcache import Direction
from fastserve.latency import HostLink, LatencyModel, StageLink, decode_times
from fastserve.scheduler.iteration import Iteration, IterationResult
from fastserve.simulation.range_guard import RangeGuard


@mypyc_attr(allow_interpreted_subclasses=True)
class SimulatedExecutor(Executor):
    """Simulates the stages of the pipeline, the links between them and both directions of the host link in parallel.

    Each of these does one thing at a time, in the order submitted:

    - A stage computes an iteration, in the time that its latency model says.
    - A stage link sends the activations of an iteration. Only the receiving stage waits for it.
    - A direction of the host link carries a transfer, at the link's bandwidth after its latency.

    Every GPU has its own host link, for its part of a cache, and all parts move alike. So a transfer is priced once,
    over `host_link`, the sum of those links.
    """

    has_logits = False

    def __init__(
        self,
        stages: Sequence[LatencyModel],
        host_link: HostLink,
        clock: Clock,
        *,
        stage_link: StageLink | None = None,
        transfer_overhead_s: float = 0.0,
        number_tokens: bool = False,
        token_ids: Sequence[int] = (),
        range_guard: RangeGuard | None = None,
    ) -> None:
        """Simulate on the given clock.

        Args:
            stages: times of each stage, from the first to the last.
            host_link: between GPU and host memory.
            clock: a VirtualClock, or a WallClock that is slept on.
            stage_link: between consecutive stages; None: sends take no time.
            transfer_overhead_s: of the host, added to an iteration for each transfer since the last one.
            number_tokens: make each token its index in the output, so that a client notices a lost or repeated one.
                Otherwise every token is 0.
            token_ids: with `number_tokens`, use that index to pick a token from these, cyclically.
            range_guard: is told of every iteration; None: the range of the times is not known.
        """
        self.max_in_flight = len(stages)
        self._kinds = tuple(dict.fromkeys(stages))
        """Distinct stages: the time of equal stages is computed once."""
        self._kind_of_stage = [self._kinds.index(stage) for stage in stages]
        self._host_link = host_link
        self._stage_link = stage_link
        self._transfer_overhead_s = transfer_overhead_s
        self._owed_s = 0.0
        """Time of the host for transfers that started while nothing was computed: the next iteration has it."""
        self._clock = clock
        self._number_tokens = number_tokens
        self._token_ids = token_ids
        self.range_guard = range_guard
        self._stages_free_at = [0.0] * len(stages)
        self._links_free_at = [0.0] * len(stages)
        """Of the link into each stage; the first entry is unused."""
        self._computing: deque[IterationResult] = deque()
        self._transfers: list[tuple[float, int, FinishedTransfer]] = []
        self._num_transfers = 0
        self._direction_free_at = {Direction.OUT: 0.0, Direction.IN: 0.0}

    @property
    def can_submit(self) -> bool:
        """Whether the first stage has ended the last iteration submitted."""
        return self._stages_free_at[0] <= self._clock.now()

    @property
    def can_collect(self) -> bool:
        """Whether the oldest iteration has ended."""
        return bool(self._computing) and self._computing[0].end_s <= self._clock.now()

    def add_request(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        """Take note of the request's length. The last token is never fed back."""
        if self.range_guard is not None:
            self.range_guard.admit(request.num_prompt_tokens + params.max_tokens - 1)

    def submit(self, iteration: Iteration) -> None:
        """Compute when the iteration and its transfers end."""
        now = self._clock.now()
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            start = max(now, self._direction_free_at[transfer.direction])
            end = start + self._host_link.transfer_time(transfer.num_bytes)
            self._direction_free_at[transfer.direction] = end
            self._num_transfers += 1
            heapq.heappush(self._transfers, (end, self._num_transfers, FinishedTransfer(transfer, start, end)))
            self._owed_s += self._transfer_overhead_s
        if iteration.requests:
            prefill_lens, context_lens, prefix_lens = _shape(iteration)
            seconds = [kind.iteration_time(prefill_lens, context_lens, prefix_lens) for kind in self._kinds]
            if self.range_guard is not None:
                self.range_guard.add(seconds[0], prefill_lens, context_lens, prefix_lens)
            end = now + seconds[0]
            end += self._owed_s
            self._owed_s = 0.0
            self._stages_free_at[0] = end
            if self.max_in_flight > 1:
                end = self._through_later_stages(end, seconds, sum(prefill_lens) + len(context_lens))
            tokens: tuple[int, ...] = (0,) * len(iteration.requests)
            if self._number_tokens:
                tokens = tuple(self._token(request.num_output_tokens) for request in iteration.requests)
            self._computing.append(IterationResult(tokens, now, end))

    def _token(self, index: int) -> int:
        return self._token_ids[index % len(self._token_ids)] if self._token_ids else index

    def _through_later_stages(self, end: float, seconds: Sequence[float], num_tokens: int) -> float:
        """When the last stage ends an iteration that the first stage ends at `end`; `seconds` are by kind of stage."""
        stage_link, stages_free_at, links_free_at = self._stage_link, self._stages_free_at, self._links_free_at
        sending = stage_link.transfer_time(num_tokens) if stage_link else 0.0
        rendezvous = stage_link is not None and stage_link.rendezvous
        for stage in range(1, self.max_in_flight):
            start = max(end, links_free_at[stage])
            if rendezvous:
                start = max(start, stages_free_at[stage])
            arrived = links_free_at[stage] = start + sending
            end = stages_free_at[stage] = max(arrived, stages_free_at[stage]) + seconds[self._kind_of_stage[stage]]
        return end

    def predict_ends(self, iteration: Iteration, count: int, until: float) -> np.ndarray | None:
        """Ends of iterations without gaps between them, as `submit` would compute them."""
        if self._computing or iteration.padded or self.max_in_flight > 1 or self._owed_s:
            return None
        durations = decode_times(self._kinds[0], [request.num_tokens for request in iteration.requests], count)
        if self._transfers:
            until = min(until, self._transfers[0][0])
        ends = np.add.accumulate(np.concatenate(([self._clock.now()], durations)))
        # Iteration k starts at ends[k].
        return ends[1 : 1 + int(np.searchsorted(ends[:-1], until, side="left"))]

    def jumped(self, iteration: Iteration, times: np.ndarray) -> None:
        """Count their time."""
        if self.range_guard is not None:
            self.range_guard.add_decodes(iteration.requests, times)

    def collect(self) -> IterationResult:
        """Move the clock to the end of the oldest iteration."""
        result = self._computing.popleft()
        self._clock.sleep_until(result.end_s)
        return result

    def wait(self, until: float) -> None:
        """Move the clock to the next end of anything, at most to `until`."""
        if self._transfers:
            until = min(until, self._transfers[0][0])
        if self._computing:
            until = min(until, self._computing[0].end_s)
            if self._stages_free_at[0] > self._clock.now():
                until = min(until, self._stages_free_at[0])
        self._clock.sleep_until(until)

    def finished_transfers(self) -> list[FinishedTransfer]:
        """Transfers that have ended, in the order of their ends."""
        finished = []
        now = self._clock.now()
        while self._transfers and self._transfers[0][0] <= now:
            finished.append(heapq.heappop(self._transfers)[2])
        return finished

    @property
    def num_transfers_in_flight(self) -> int:
        """Transfers not yet returned by `finished_transfers`."""
        return len(self._transfers)


def _shape(iteration: Iteration) -> tuple[list[int], list[int], list[int]]:
    """Prompt tokens, decode contexts and, if a prompt is chunked, the tokens before each chunk; padding included."""
    if sum(iteration.num_scheduled_tokens) == len(iteration.requests) and not iteration.padded:
        context_lens = [request.num_computed_tokens + 1 for request in iteration.requests]
        if min(context_lens) > 1:  # All decode.
            return [], context_lens, []
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
    return prefill_lens, context_lens, prefix_lens if any(prefix_lens) else []
