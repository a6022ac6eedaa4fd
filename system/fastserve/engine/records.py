"""The rows that a run records: of requests.parquet and of iterations.parquet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class IterationRecord(NamedTuple):
    """The row of iterations.parquet: one computed iteration. Times are in seconds on the engine's clock."""

    start_s: float
    end_s: float
    num_requests: int
    num_scheduled_tokens: int
    num_waiting: int
    """Unfinished requests that were in no batch in flight when this one ended."""
    free_gpu_blocks: int
    free_host_blocks: int
    num_preempted: int
    stalled_s: float
    """Time since the previous iteration in which transfers kept the engine from computing."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """The row of requests.parquet: one request. Times are in seconds from the start of the run; NaN: never happened."""

    request_id: str
    status: str
    arrival_s: float
    first_scheduled_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    output_tokens: int
    queueing_s: float
    swapping_s: float
    execution_s: float
    """queueing_s + swapping_s + execution_s is the job completion time."""
    max_token_gap_s: float
    """Longest time between two consecutive output tokens."""
    preemptions: int
    swap_out_bytes: int
    swap_in_bytes: int
    recomputed_tokens: int
    cached_tokens: int
    """Tokens found in the cache at an admission instead of computed; 0 without prefix caching."""
    error: str

    @property
    def tpot_s(self) -> float:
        """Mean time between output tokens; NaN for fewer than two."""
        if self.output_tokens < 2:
            return math.nan
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)
