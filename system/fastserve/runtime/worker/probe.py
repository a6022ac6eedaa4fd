"""Time iterations and copies of given shapes, without an engine."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Protocol

from fastserve.core.clock import WallClock
from fastserve.core.request import SamplingParams
from fastserve.kvcache import Direction
from fastserve.latency.fitting import StageTimes
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.worker.copier import make_copier
from fastserve.runtime.worker.runner import Runner
from fastserve.runtime.worker.sampler import SamplingLike
from fastserve.runtime.worker.worker import Worker


class Shapes:
    """Makes sequences of given shapes for a runner whose cache is empty."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # Random tokens: a GPU computes constant ones faster than real ones.
        rng = random.Random(0)
        config = runner.model_config
        self._token_ids = [rng.randrange(config.vocab_size) for _ in range(2 * config.max_model_len)]

    def sequences(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> list[SequenceInput]:
        """Sequences of these prompt lengths, and one decode token at each of these contexts."""
        sequences: list[SequenceInput] = []
        next_block = next_token = 0
        for length, computed in [(n, 0) for n in prefill_lens] + [(1, n - 1) for n in context_lens]:
            count = -(-(computed + length) // self._runner.block_size)
            # A pool that is too small is reused from the start: only time is measured.
            table = [block % self._runner.num_gpu_blocks for block in range(next_block, next_block + count)]
            next_block += count
            # Only a slice: touching much memory here would leave the iteration with cold CPU caches.
            first = next_token % (len(self._token_ids) - length)
            next_token += length
            sequences.append(SequenceInput(self._token_ids[first : first + length], computed, table))
        return sequences


class Probe(Shapes):
    """Times iterations of given shapes on a worker, or on a group of ranks."""

    def iteration_time(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Seconds of one iteration of these prompts and one decode token at each of these contexts."""
        sequences = self.sequences(prefill_lens, context_lens)
        params = [SamplingParams()] * len(sequences)
        if not prefill_lens:  # An engine does this while the last iteration runs.
            self._runner.prepare(sequences)
        start = time.perf_counter()
        self._runner.execute(sequences, params)
        return time.perf_counter() - start


class Stages(Runner, Protocol):
    """A group of ranks, whose stages can be timed."""

    def probe(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> tuple[float, ...]:
        """Seconds that each stage takes for its part; all compute at the same time."""


class StageProbe(Shapes):
    """Times the stages of a group of ranks."""

    def __init__(self, ranks: Stages) -> None:
        super().__init__(ranks)
        self._ranks = ranks

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Times of the stages for one iteration of these prompts and one decode token at each of these contexts."""
        sequences = self.sequences(prefill_lens, context_lens)
        params = [SamplingParams()] * len(sequences)
        start = time.perf_counter()
        stages = self._ranks.probe(sequences, params)
        return StageTimes(stages, max(0.0, time.perf_counter() - start - max(stages)))


def copy_bandwidth(worker: Worker, repeats: int = 5) -> float:
    """Bytes per second of copies from the device's pool to the host's; 0 without a host pool."""
    count = min(worker.num_gpu_blocks, worker.num_host_blocks, 64)
    if not count:
        return 0.0
    blocks = range(count)
    copier = make_copier(worker.gpu_cache, worker.host_cache, WallClock())
    best = math.inf
    for _ in range(repeats):
        copier.start(Direction.OUT, blocks, blocks, None)
        copier.wait(math.inf)
        (copy,) = copier.finished()
        best = min(best, copy.end_s - copy.start_s)
    copier.close()
    return count * worker.gpu_cache[0].nbytes / best
