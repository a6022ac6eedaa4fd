"""Job: what the engine knows of a request and the scheduler must not, such as its stop condition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastserve.core.logprobs import RequestLogprobs
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine.records import RequestMetrics


@dataclass(slots=True)
class Job:
    """A request, its stop condition and its measurements. Times are in seconds on the engine's clock."""

    request: Request
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    max_tokens: int = field(init=False)
    """Most tokens of prompt and output together."""
    stop_token_ids: frozenset[int] = field(init=False)
    """Tokens that end the request; they include the end of sequence unless it is ignored."""
    min_tokens: int = field(init=False)
    """Tokens of prompt and output together before which a stop token does not end the request."""
    logprobs: RequestLogprobs | None = field(init=False, default=None)
    """Log probabilities of its tokens; None unless the request asks for them."""
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    max_token_gap_s: float = 0.0
    swapping_s: float = 0.0
    """Time in which the request was chosen to run but a transfer, its own or another's, kept it from running."""
    execution_s: float = 0.0
    preemptions: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """Why the request was rejected or failed; empty otherwise."""

    def __post_init__(self) -> None:
        self.max_tokens = self.request.num_prompt_tokens + self.params.max_tokens
        self.min_tokens = self.request.num_prompt_tokens + self.params.min_tokens
        if self.params.asks_logprobs:
            self.logprobs = RequestLogprobs()
        eos = () if self.params.ignore_eos else self.eos_token_ids
        self.stop_token_ids = frozenset((*self.params.stop_token_ids, *eos))

    @property
    def metrics(self) -> RequestMetrics:
        """The row of requests.parquet."""
        request = self.request
        finished_s = _or_nan(self.finished_s)
        return RequestMetrics(
            request_id=request.request_id,
            status=request.status.value,
            arrival_s=request.arrival_s,
            first_scheduled_s=_or_nan(self.first_scheduled_s),
            first_token_s=_or_nan(self.first_token_s),
            finished_s=finished_s,
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            queueing_s=finished_s - request.arrival_s - self.swapping_s - self.execution_s,
            swapping_s=self.swapping_s,
            execution_s=self.execution_s,
            max_token_gap_s=self.max_token_gap_s,
            preemptions=self.preemptions,
            swap_out_bytes=self.swap_out_bytes,
            swap_in_bytes=self.swap_in_bytes,
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self.cached_tokens,
            error=self.error,
        )

    @property
    def is_done(self) -> bool:
        """Whether the request has left the system: finished, aborted, failed or rejected."""
        return self.request.status is not RequestStatus.ACTIVE


def _or_nan(time_s: float | None) -> float:
    return math.nan if time_s is None else time_s
