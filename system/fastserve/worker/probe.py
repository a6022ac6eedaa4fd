"""Time a worker's iterations and copies by shape, without an engine around it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastserve.models import SequenceInput
from fastserve.request import SamplingParams
from fastserve.worker.worker import Worker


class WorkerProbe:
    """Runs iterations of given shapes on a worker whose cache holds nothing yet."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._num_blocks = worker.gpu_cache.shape[0]

    def iteration_time(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Seconds for one iteration of these prompts and one decode token at each of these contexts."""
        sequences: list[SequenceInput] = []
        next_block = 0
        for length, computed in [(n, 0) for n in prefill_lens] + [(1, n - 1) for n in context_lens]:
            count = -(-(computed + length) // self._worker.block_size)
            # A pool too small for the shape is reused from the start: only time is measured here.
            table = [block % self._num_blocks for block in range(next_block, next_block + count)]
            next_block += count
            sequences.append(SequenceInput([7] * length, computed, table))
        params = [SamplingParams()] * len(sequences)
        start = time.perf_counter()
        self._worker.execute(sequences, params)
        return time.perf_counter() - start

    def copy_bandwidth(self, repeats: int = 5) -> float:
        """Bytes per second of copies from the device's pool to the host's, or 0 without a host pool."""
        count = min(self._num_blocks, self._worker.host_cache.shape[0], 64)
        if not count:
            return 0.0
        blocks = list(range(count))
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            self._worker.copy_out(blocks, blocks)
            best = min(best, time.perf_counter() - start)
        return count * self._worker.gpu_cache[0].nbytes / best
