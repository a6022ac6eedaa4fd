"""LocalExecutor: one worker in this process computes; copies between the pools run beside it, a thread each way."""

from __future__ import annotations

import math
import queue
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from fastserve.clock import Clock
from fastserve.executor.base import Executor, FinishedTransfer, IterationResult
from fastserve.kvcache import Direction, KVCacheManager, Transfer
from fastserve.models import SequenceInput
from fastserve.request import Request, SamplingParams
from fastserve.scheduler.iteration import Iteration
from fastserve.worker import Worker


class LocalExecutor(Executor):
    """Computes an iteration when it is collected. Reads block tables from `kv` at submission and changes nothing.

    Transfers need no order among themselves or with the computation: the manager gives no block away before the copy
    that involves it has been reported as finished.
    """

    def __init__(self, worker: Worker, kv: KVCacheManager, clock: Clock) -> None:
        self._worker = worker
        self._kv = kv
        self._clock = clock
        self._params: dict[str, SamplingParams] = {}
        self._submitted: deque[tuple[float, Iteration, list[SequenceInput], list[SamplingParams]]] = deque()
        self._copiers = {
            direction: ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-copy-{direction.value}")
            for direction in Direction
        }
        self._copied: queue.SimpleQueue[tuple[FinishedTransfer, BaseException | None]] = queue.SimpleQueue()
        self._arrived: list[FinishedTransfer] = []
        self._num_transfers = 0

    def add_request(self, request: Request, params: SamplingParams) -> None:
        """Remember how to sample."""
        self._params[request.request_id] = params

    def remove_request(self, request: Request) -> None:
        """Forget how to sample."""
        del self._params[request.request_id]

    def submit(self, iteration: Iteration) -> None:
        """Start the copies and line up the computation."""
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            self._num_transfers += 1
            self._copiers[transfer.direction].submit(self._copy, transfer)
        if iteration.requests:
            start = self._clock.now()
            sequences, params = [], []
            for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
                if not count:  # Padding takes time and computes nothing; here it does not take time either.
                    continue
                first = request.num_computed_tokens
                sequences.append(
                    SequenceInput(request.token_ids[first : first + count], first, self._kv.block_table(request))
                )
                params.append(self._params[request.request_id])
            self._submitted.append((start, iteration, sequences, params))

    def collect(self) -> IterationResult:
        """Compute the oldest iteration."""
        start, iteration, sequences, params = self._submitted.popleft()
        tokens = self._worker.execute(sequences, params)
        if len(tokens) < len(iteration.requests):
            computed = iter(tokens)
            tokens = [next(computed) if count else 0 for count in iteration.num_scheduled_tokens]
        return IterationResult(tokens, start, self._clock.now())

    def wait(self, until: float) -> None:
        """Wait for the next copy to end; without one, sleep."""
        if self._arrived:
            return
        if not self._num_transfers:
            self._clock.sleep_until(until)
            return
        timeout = None if math.isinf(until) else max(0.0, until - self._clock.now())
        try:
            self._take(self._copied.get(timeout=timeout))
        except queue.Empty:
            return

    def finished_transfers(self) -> list[FinishedTransfer]:
        """Copies that have ended; raises what a failed one raised."""
        while not self._copied.empty():
            self._take(self._copied.get())
        arrived, self._arrived = self._arrived, []
        self._num_transfers -= len(arrived)
        return arrived

    @property
    def num_transfers_in_flight(self) -> int:
        """Copies not yet reported as finished."""
        return self._num_transfers

    def close(self) -> None:
        """Stop the copying threads."""
        for copier in self._copiers.values():
            copier.shutdown()

    def _copy(self, transfer: Transfer) -> None:
        copy = self._worker.copy_out if transfer.direction is Direction.OUT else self._worker.copy_in
        start = self._clock.now()
        error: BaseException | None = None
        try:
            copy(transfer.source, transfer.destination)
        except BaseException as caught:
            error = caught
        self._copied.put((FinishedTransfer(transfer, start, self._clock.now()), error))

    def _take(self, copied: tuple[FinishedTransfer, BaseException | None]) -> None:
        finished, error = copied
        if error is not None:
            raise error
        self._arrived.append(finished)
