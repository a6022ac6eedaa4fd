"""Iteration time through a pipeline of stages, alike or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastserve.latency.base import LatencyModel, decode_times
from fastserve.latency.communication import StageLink


@dataclass(frozen=True, slots=True)
class PipelinedLatency:
    """LatencyModel of a pipeline that has nothing else in flight: every stage in turn, and a send between two."""

    stages: tuple[LatencyModel, ...]
    """From the first to the last. Those that are equal are priced once."""
    link: StageLink
    _counts: tuple[tuple[LatencyModel, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_counts", tuple(Counter(self.stages).items()))

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds from the first stage's start to the last stage's end; 0 for an empty iteration."""
        num_tokens = sum(prefill_lens) + len(decode_context_lens)
        if not num_tokens:
            return 0.0
        computing = 0.0
        for stage, count in self._counts:
            computing += count * stage.iteration_time(prefill_lens, decode_context_lens, prefix_lens)
        return self._sending(num_tokens) + computing

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """What `iteration_time` gives for `count` decode iterations in a row, to the bit."""
        computing = np.zeros(count)
        for stage, of_them in self._counts:
            computing += of_them * decode_times(stage, context_lens, count)
        return self._sending(len(context_lens)) + computing

    def _sending(self, num_tokens: int) -> float:
        return (len(self.stages) - 1) * self.link.transfer_time(num_tokens)
