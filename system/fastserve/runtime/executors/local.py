"""LocalExecutor: a worker in this process computes, while caches are copied between its pools."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastserve.core.clock import Clock
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Executor, FinishedTransfer
from fastserve.kvcache import KVCacheManager
from fastserve.runtime.executors.inputs import Inputs, by_request
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.copier import make_copier
from fastserve.runtime.worker.runner import Computed
from fastserve.scheduler.iteration import Iteration, IterationResult


@dataclass(frozen=True, slots=True)
class _Launched:
    """An iteration in flight."""

    iteration: Iteration
    start_s: float
    sequences: list[SequenceInput]
    wait: Callable[[], Computed]


class LocalExecutor(Executor):
    """Runs iterations on a worker of this process. Reads block tables from `kv` at submission and changes nothing.

    Copies need no order among themselves or with the computation: the cache manager reuses no block before its copy
    has been reported as finished.
    """

    def __init__(self, worker: Worker, kv: KVCacheManager, clock: Clock) -> None:
        self._worker = worker
        self._kv = kv
        self._clock = clock
        self._inputs = Inputs(kv)
        self._submitted: deque[_Launched] = deque()
        self._prepared: tuple[tuple[Request, ...], list[SequenceInput]] | None = None
        """Requests of the last iteration, and their inputs if the next iteration runs the same requests."""
        self._copier = make_copier(worker.gpu_cache, worker.host_cache, clock)

    def add_request(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        """Keep the request's sampling parameters."""
        self._inputs.add(request, params, eos_token_ids)

    def remove_request(self, request: Request) -> None:
        """Forget the request's sampling parameters."""
        self._inputs.remove(request)

    def submit(self, iteration: Iteration) -> None:
        """Start the computation, then the copies: the device computes while the host starts them."""
        if iteration.requests:
            start = self._clock.now()
            sequences = self._take_prepared(iteration) or self._inputs.sequences(iteration)
            inputs = self._inputs
            launched = self._worker.launch(sequences, inputs.sampling(iteration), inputs.extras(iteration))
            self._submitted.append(_Launched(iteration, start, sequences, launched))
        self._prepared = None
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            self._copier.start(transfer.direction, transfer.source, transfer.destination, transfer)

    def collect(self) -> IterationResult:
        """Wait for the oldest iteration; on a CPU, compute it now."""
        launched = self._submitted.popleft()
        iteration = launched.iteration
        if max(iteration.num_scheduled_tokens) == min(iteration.num_scheduled_tokens) == 1:
            # Most decode batches run again, one token further: prepare that while the device computes.
            following = [SequenceInput([0], each.start + 1, each.block_table) for each in launched.sequences]
            self._worker.prepare(following)
            self._prepared = (iteration.requests, following)
        tokens, scores = by_request(launched.wait(), iteration.num_scheduled_tokens)
        return IterationResult(tokens, launched.start_s, self._clock.now(), scores)

    def _take_prepared(self, iteration: Iteration) -> list[SequenceInput] | None:
        """The inputs prepared while the last iteration ran, if this iteration needs exactly these; None otherwise."""
        if self._prepared is None or self._prepared[0] != iteration.requests:
            return None
        sequences = self._prepared[1]
        for request, count, sequence in zip(iteration.requests, iteration.num_scheduled_tokens, sequences, strict=True):
            if count != 1 or sequence.start != request.num_computed_tokens:
                return None
            if sequence.block_table is not self._kv.block_table(request):  # Swapped out meanwhile.
                return None
            sequence.token_ids[0] = request.token_ids[sequence.start]
        return sequences

    def wait(self, until: float) -> None:
        """Wait for the next copy to end; without copies, sleep until `until`."""
        if self._copier.num_in_flight:
            self._copier.wait(until)
        else:
            self._clock.sleep_until(until)

    def finished_transfers(self) -> list[FinishedTransfer]:
        """Copies that have ended; raises the error of a copy that failed."""
        return [FinishedTransfer(*copy) for copy in self._copier.finished()]

    @property
    def num_transfers_in_flight(self) -> int:
        """Copies not yet returned by `finished_transfers`."""
        return self._copier.num_in_flight

    def close(self) -> None:
        """Wait for the copies and release their threads or streams."""
        self._copier.close()
