"""Iteration time with an engine's own time added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastserve.latency.base import LatencyModel, decode_times
from fastserve.latency.engine_time import EngineTime


class WithEngineTime:
    """LatencyModel of a stage with an engine's own time added to every iteration, but for its transfers."""

    __slots__ = ("_per_iteration_s", "_per_request_s", "_per_token_s", "engine_time", "stage")

    def __init__(self, stage: LatencyModel, engine_time: EngineTime) -> None:
        self.stage = stage
        self.engine_time = engine_time
        self._per_iteration_s = engine_time.per_iteration_s
        self._per_request_s = engine_time.per_request_s
        self._per_token_s = engine_time.per_token_s

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithEngineTime) and self.stage == other.stage and self.engine_time == other.engine_time

    def __hash__(self) -> int:
        return hash((self.stage, self.engine_time))

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds for one iteration; 0 for an empty one."""
        num_decodes = len(decode_context_lens)
        num_sequences = len(prefill_lens) + num_decodes
        if not num_sequences:
            return 0.0
        return self.stage.iteration_time(prefill_lens, decode_context_lens, prefix_lens) + self._own_time(
            num_sequences, sum(prefill_lens) + num_decodes
        )

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """What `iteration_time` gives for `count` decode iterations in a row, to the bit."""
        batch = len(context_lens)
        return decode_times(self.stage, context_lens, count) + self._own_time(batch, batch)

    def _own_time(self, num_sequences: int, num_tokens: int) -> float:
        return self._per_iteration_s + (self._per_request_s * num_sequences + self._per_token_s * num_tokens)
