"""Iteration time through a pipeline of equal stages, and the link between one stage and the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.config import require_int, require_positive
from fastserve.errors import ConfigError
from fastserve.latency.fitted import FittedLatency


@dataclass(frozen=True, slots=True)
class StageLink:
    """The link over which a pipeline stage sends its activations to the next."""

    latency_s: float
    bandwidth_bytes_per_s: float
    bytes_per_token: int
    """Activations of one token that cross this link."""

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < float("inf"):
            raise ConfigError(f"stage_link.latency_s must be a finite number of at least 0, got {self.latency_s!r}")
        require_positive("stage_link.bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        require_int("stage_link.bytes_per_token", self.bytes_per_token, 1)

    def transfer_time(self, num_tokens: int) -> float:
        """Seconds to send the activations of an iteration that computes this many tokens."""
        return self.latency_s + num_tokens * self.bytes_per_token / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class PipelinedLatency:
    """LatencyModel of a pipeline that has nothing else in flight: every stage in turn, and a send between two.

    The layers divide evenly, so all stages take the same time.
    """

    stage: FittedLatency
    num_stages: int
    link: StageLink

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds from the first stage's start to the last stage's end; 0 for an empty iteration."""
        num_tokens = sum(prefill_lens) + len(decode_context_lens)
        if not num_tokens:
            return 0.0
        return self._sending(num_tokens) + self.num_stages * self.stage.iteration_time(
            prefill_lens, decode_context_lens, prefix_lens
        )

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """What `iteration_time` gives for `count` decode iterations in a row, to the bit."""
        return self._sending(len(context_lens)) + self.num_stages * self.stage.decode_times(context_lens, count)

    def _sending(self, num_tokens: int) -> float:
        return (self.num_stages - 1) * self.link.transfer_time(num_tokens)
