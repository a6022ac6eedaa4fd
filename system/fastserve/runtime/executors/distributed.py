"""DistributedExecutor: a group of ranks computes and copies, each rank its part."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.core.clock import Clock
from fastserve.core.errors import RankError
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Executor, FinishedTransfer
from fastserve.kvcache import KVCacheManager, Transfer
from fastserve.runtime.executors.inputs import Inputs, by_request
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.worker.protocol import parse_tokens
from fastserve.runtime.worker.runner import Computed
from fastserve.scheduler.iteration import Iteration, IterationResult


@dataclass(slots=True)
class _Copying:
    """A transfer that some ranks have not ended."""

    transfer: Transfer
    num_left: int
    start_s: float = math.inf


class DistributedExecutor(Executor):
    """Sends every iteration and transfer to all ranks at submission; each rank does its part, in that order.

    A transfer is decided once, and ends when all ranks have ended their part. So a request is not scheduled before all
    stages have its cache, and no block is reused before all stages are done with it. Later stages copy while they
    compute, and no stage waits for a copy. Times are read in this process, when a message arrives.
    """

    def __init__(self, ranks: RankGroup, kv: KVCacheManager, clock: Clock) -> None:
        self.max_in_flight = ranks.config.parallel.pipeline_parallel_size
        self._ranks = ranks
        self._clock = clock
        self._inputs = Inputs(kv)
        self._running: deque[tuple[Iteration, float]] = deque()
        """Iterations not yet collected, and when they were submitted (seconds)."""
        self._results: deque[tuple[Computed, float]] = deque()
        """Results of the oldest of these, and when they arrived (seconds)."""
        self._in_first_stage: int | None = None
        """Number of the iteration in the first stage; None if that is free."""
        self._num_transfers = 0
        self._copying: dict[int, _Copying] = {}
        self._copied: list[FinishedTransfer] = []

    def add_request(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        """Keep the request's sampling parameters."""
        self._inputs.add(request, params, eos_token_ids)

    def remove_request(self, request: Request) -> None:
        """Forget the request's sampling parameters."""
        self._inputs.remove(request)

    @property
    def can_submit(self) -> bool:
        """Whether the first stage has ended its last iteration."""
        return self._in_first_stage is None

    @property
    def can_collect(self) -> bool:
        """Whether the tokens of the oldest iteration have arrived."""
        self._poll(0.0)
        return bool(self._results)

    def submit(self, iteration: Iteration) -> None:
        """Send the iteration and its transfers to the ranks."""
        if iteration.requests:
            start = self._clock.now()
            inputs = self._inputs
            self._in_first_stage = self._ranks.run(
                inputs.sequences(iteration), inputs.sampling(iteration), inputs.extras(iteration)
            )
            self._running.append((iteration, start))
        transfers = (*iteration.swap_out, *iteration.swap_in)
        if transfers:
            numbered = list(enumerate(transfers, self._num_transfers))
            self._num_transfers += len(transfers)
            self._copying |= {index: _Copying(transfer, self._ranks.world_size) for index, transfer in numbered}
            self._ranks.copy(numbered)

    def collect(self) -> IterationResult:
        """Wait for the tokens of the oldest iteration."""
        while not self._results:
            self._poll(math.inf)
        iteration, start = self._running.popleft()
        computed, end = self._results.popleft()
        tokens, scores = by_request(computed, iteration.num_scheduled_tokens)
        return IterationResult(tokens, start, end, scores)

    def wait(self, until: float) -> None:
        """Wait for a message from a rank."""
        if self._results or self._copied:
            return
        while (left := until - self._clock.now()) > 0 and not self._poll(left):
            pass

    def finished_transfers(self) -> list[FinishedTransfer]:
        """Transfers that every rank has ended."""
        self._poll(0.0)
        copied, self._copied = self._copied, []
        return copied

    @property
    def num_transfers_in_flight(self) -> int:
        """Transfers not yet returned by `finished_transfers`."""
        return len(self._copying) + len(self._copied)

    def close(self) -> None:
        """Wait until the ranks have done their work. The ranks keep running."""
        try:
            while self._running or self._copying:
                self._poll(math.inf)
                while self._results:
                    self._results.popleft()
                    self._running.popleft()
        except RankError:  # Reported by an earlier call, or no caller waits for the work.
            pass

    def _poll(self, timeout_s: float) -> bool:
        """Process messages, after waiting for up to `timeout_s` seconds for the first; whether there were any."""
        messages = self._ranks.poll(timeout_s)
        if not messages:
            return False
        now = self._clock.now()
        for message in messages:
            numbers = message.numbers
            if message.kind == "tokens":
                self._results.append((parse_tokens(message), now))
            elif message.kind == "copied":
                self._part_copied(numbers[0], now - numbers[1] * 1e-9, now)
            # By number: a "free" of an earlier probe may arrive after its "tokens".
            if message.kind in ("free", "tokens") and numbers[0] == self._in_first_stage:
                self._in_first_stage = None
        if len(self._results) == len(self._running) and not self._copying:
            self._ranks.idle()
        return True

    def _part_copied(self, index: int, start: float, end: float) -> None:
        copying = self._copying[index]
        copying.num_left -= 1
        copying.start_s = min(copying.start_s, start)
        if not copying.num_left:
            del self._copying[index]
            self._copied.append(FinishedTransfer(copying.transfer, max(0.0, copying.start_s), end))
