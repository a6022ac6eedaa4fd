"""LocalExecutor: one worker in this process computes; copies between the pools run beside it."""

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
    """An iteration on its way."""

    iteration: Iteration
    start_s: float
    sequences: list[SequenceInput]
    wait: Callable[[], Computed]


class LocalExecutor(Executor):
    """Runs iterations on a worker of this process. Reads block tables from `kv` at submission and changes nothing.

    Transfers need no order among themselves or with the computation: the manager gives no block away before the copy
    that involves it has been reported as finished.
    """

    def __init__(self, worker: Worker, kv: KVCacheManager, clock: Clock) -> None:
        self._worker = worker
        self._kv = kv
        self._clock = clock
        self._inputs = Inputs(kv)
        self._submitted: deque[_Launched] = deque()
        self._foreseen: tuple[tuple[Request, ...], list[SequenceInput]] | None = None
        """Requests of the last iteration, and what they compute if the next is of the same."""
        self._copier = make_copier(worker.gpu_cache, worker.host_cache, clock)

    def add_request(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        """Remember how to sample."""
        self._inputs.add(request, params, eos_token_ids)

    def remove_request(self, request: Request) -> None:
        """Forget how to sample."""
        self._inputs.remove(request)

    def submit(self, iteration: Iteration) -> None:
        """Start the computation, then the copies: starting them takes time in which the device can already work."""
        if iteration.requests:
            start = self._clock.now()
            sequences = self._foreseen_sequences(iteration) or self._inputs.sequences(iteration)
            inputs = self._inputs
            launched = self._worker.launch(sequences, inputs.sampling(iteration), inputs.extras(iteration))
            self._submitted.append(_Launched(iteration, start, sequences, launched))
        self._foreseen = None
        for transfer in (*iteration.swap_out, *iteration.swap_in):
            self._copier.start(transfer.direction, transfer.source, transfer.destination, transfer)

    def collect(self) -> IterationResult:
        """Wait for the oldest iteration; on a CPU, compute it."""
        launched = self._submitted.popleft()
        iteration = launched.iteration
        if max(iteration.num_scheduled_tokens) == min(iteration.num_scheduled_tokens) == 1:
            # Most decode batches run again as they are, a token further: while the device works, prepare that.
            ahead = [SequenceInput([0], one.start + 1, one.block_table) for one in launched.sequences]
            self._worker.prepare(ahead)
            self._foreseen = (iteration.requests, ahead)
        tokens, scores = by_request(launched.wait(), iteration.num_scheduled_tokens)
        return IterationResult(tokens, launched.start_s, self._clock.now(), scores)

    def _foreseen_sequences(self, iteration: Iteration) -> list[SequenceInput] | None:
        """The sequences prepared while the last iteration ran, if they are what this one needs."""
        if self._foreseen is None or self._foreseen[0] != iteration.requests:
            return None
        sequences = self._foreseen[1]
        for request, count, one in zip(iteration.requests, iteration.num_scheduled_tokens, sequences, strict=True):
            if count != 1 or one.start != request.num_computed_tokens:
                return None
            if one.block_table is not self._kv.block_table(request):  # It was away in between.
                return None
            one.token_ids[0] = request.token_ids[one.start]
        return sequences

    def wait(self, until: float) -> None:
        """Wait for the next copy to end; without one, sleep."""
        if self._copier.num_in_flight:
            self._copier.wait(until)
        else:
            self._clock.sleep_until(until)

    def finished_transfers(self) -> list[FinishedTransfer]:
        """Copies that have ended; raises what a failed one raised."""
        return [FinishedTransfer(*copy) for copy in self._copier.finished()]

    @property
    def num_transfers_in_flight(self) -> int:
        """Copies not yet reported as finished."""
        return self._copier.num_in_flight

    def close(self) -> None:
        """Wait for the copies and give back what they ran on."""
        self._copier.close()
