"""Job: what the engine knows of a request and a scheduler must not: when it ends, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastserve.request import Request, RequestStatus, SamplingParams

_NAN = float("nan")


@dataclass(slots=True)
class Job:
    """A request, its stop condition and its measurements. Times are in seconds on the engine's clock."""

    request: Request
    params: SamplingParams
    max_tokens: int = field(init=False)
    first_scheduled_s: float = _NAN
    first_token_s: float = _NAN
    last_token_s: float = _NAN
    finished_s: float = _NAN
    max_token_gap_s: float = 0.0
    swapping_s: float = 0.0
    """Time it was chosen to run and waited for a transfer, its own or another's."""
    execution_s: float = 0.0
    preemptions: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    recomputed_tokens: int = 0
    error: str = ""
    """Why it was rejected; empty otherwise."""

    def __post_init__(self) -> None:
        self.max_tokens = self.request.num_prompt_tokens + self.params.max_tokens

    def is_stopped_by(self, token: int, eos_token_id: int | None) -> bool:
        """Whether generating `token` (already counted in the request) ends the job."""
        if self.request.num_tokens >= self.max_tokens:
            return True
        if token in self.params.stop_token_ids:
            return True
        return token == eos_token_id and not self.params.ignore_eos

    @property
    def jct_s(self) -> float:
        """Job completion time: arrival to last token."""
        return self.finished_s - self.request.arrival_s

    @property
    def metrics(self) -> RequestMetrics:
        """The row of requests.parquet."""
        request = self.request
        return RequestMetrics(
            request_id=request.request_id,
            status=request.status.value,
            arrival_s=request.arrival_s,
            first_scheduled_s=self.first_scheduled_s,
            first_token_s=self.first_token_s,
            finished_s=self.finished_s,
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            queueing_s=self.jct_s - self.swapping_s - self.execution_s,
            swapping_s=self.swapping_s,
            execution_s=self.execution_s,
            max_token_gap_s=self.max_token_gap_s,
            preemptions=self.preemptions,
            swap_out_bytes=self.swap_out_bytes,
            swap_in_bytes=self.swap_in_bytes,
            recomputed_tokens=self.recomputed_tokens,
            error=self.error,
        )

    @property
    def is_done(self) -> bool:
        """Whether it left the system, for whatever reason."""
        return self.request.status is not RequestStatus.ACTIVE


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What was measured of one request; times in seconds from the start of the run. NaN: never happened."""

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
    error: str
