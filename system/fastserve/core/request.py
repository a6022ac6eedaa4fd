"""A request as a scheduler sees it. SamplingParams, as its user sees it, is in fastserve.core.sampling."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.core.checks import require_int
from fastserve.core.sampling import SamplingParams as SamplingParams

CacheState = Literal[0, 1, 2]
"""Where a request's cache is: one of the three below."""
NO_CACHE: CacheState = 0
"""The request has none: it has not begun, or its cache was dropped."""
RESIDENT: CacheState = 1
"""Wholly on the GPU."""
SWAPPED_OUT: CacheState = 2
"""In host memory, or in transfer out or in."""


class Location(enum.Enum):
    """Where a request's cache is, transfers told apart."""

    NONE = "none"
    GPU = "gpu"
    HOST = "host"
    SWAPPING_OUT = "swapping_out"
    SWAPPING_IN = "swapping_in"


class RequestStatus(enum.Enum):
    """State of a request's life."""

    ACTIVE = "active"
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"
    FAILED = "failed"
    """The engine failed."""


@dataclass(slots=True, eq=False)
class Request:
    """One generation job as a scheduler sees it.

    `num_tokens` counts prompt and generated tokens; `num_computed_tokens` counts those with keys and values in the
    cache. The next iterations must compute the difference: a new prompt, the rest of a chunked prompt, a dropped cache
    again, or just the last sampled token. There are no separate phases.
    """

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    """Prompt, then generated tokens; empty in a simulation."""
    max_output_tokens: int = 0
    """The user's or the model's bound, for policies that reserve memory for it; not the real length."""
    num_tokens: int = field(init=False)
    num_computed_tokens: int = field(init=False, default=0)
    status: RequestStatus = field(init=False, default=RequestStatus.ACTIVE)
    in_flight: bool = field(init=False, default=False)
    """Whether it is part of an iteration that was submitted and not yet collected."""
    level: int = field(init=False, default=0)
    """Queue it stands in, smaller is more urgent; stays 0 in policies with one queue."""
    position: int = field(init=False, default=0)
    """Place in that queue, smaller is nearer the front."""
    line: CacheState = field(init=False, default=NO_CACHE)
    """Line of that queue, one for each cache state: that of its cache when the last decision ended. Kept, as `level`
    and `position` are, by the queue."""
    is_put_back: bool = field(init=False, default=False)
    """Whether it has returned to its place among other requests of its line."""
    previous: Request | None = field(init=False, default=None, repr=False)
    """The request before it in its line, unless it was put back; so is `next`, behind it."""
    next: Request | None = field(init=False, default=None, repr=False)
    has_place: bool = field(init=False, default=False)
    """Whether it has a place in a batch: `Policy.running` holds it. Kept by the scheduler."""
    is_chosen: bool = field(init=False, default=False)
    """Whether the batch that a decision ends with holds it; meaningful only while the scheduler compares batches."""
    cache_state: CacheState = field(init=False, default=NO_CACHE)
    """Where its cache is now. Kept, as `location`, blocks and `cache_capacity` are, by the KVCacheManager."""
    location: Location = field(init=False, default=Location.NONE)
    """The same, with transfers told apart."""
    gpu_blocks: list[int] = field(init=False, default_factory=list, repr=False)
    """Blocks of the GPU pool that it owns, in token order."""
    host_blocks: list[int] = field(init=False, default_factory=list, repr=False)
    """Blocks of the host pool that it owns, in token order."""
    cache_capacity: int = field(init=False, default=0)
    """Tokens its cache has room for, 0 unless that is wholly on the GPU."""
    num_lost_tokens: int = field(init=False, default=0)
    """Computed tokens of its cache when that was last dropped, until it has a cache again; kept with prefix caching."""
    num_tokens_at_swap_in: int = field(init=False, default=-1)
    """Computed tokens when its cache was last swapped in: if there are no more now, it has not run since."""
    wait_ends_s: float = field(init=False, default=math.inf)
    """When it will have waited as long as its policy lets it; infinite while no limited wait runs."""
    wait_before: Request | None = field(init=False, default=None, repr=False)
    """The waiting request whose wait ends next before this one's; so does that of `wait_behind`, after it."""
    wait_behind: Request | None = field(init=False, default=None, repr=False)
    last_ran_s: float = field(init=False, default=0.0)
    """When its last iteration ended (s)."""
    policy_state: Any = field(init=False, default=None, repr=False)
    """What the policy notes about the request, to order it."""

    def __post_init__(self) -> None:
        require_int(f"request {self.request_id}: num_prompt_tokens", self.num_prompt_tokens, 1)
        self.num_tokens = self.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all tokens but the newest are in the cache, so that one token remains to be computed."""
        return self.num_tokens - self.num_computed_tokens == 1 and self.num_computed_tokens > 0

    @classmethod
    def from_tokens(cls, request_id: str, arrival_s: float, token_ids: Sequence[int]) -> Request:
        """A request with the prompt itself, which real executors need."""
        return cls(request_id, arrival_s, len(token_ids), list(token_ids))
