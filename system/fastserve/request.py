"""What a request is: to its user (SamplingParams), and to a scheduler (Request: prompt and progress, no future)."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.config import require_int
from fastserve.errors import ConfigError

Part = Literal[0, 1, 2]
"""Where a request's cache is, as far as the order of service cares: one of the three below."""
FRESH: Part = 0
"""It has none: not begun, or dropped."""
RESIDENT: Part = 1
"""Wholly on the GPU."""
AWAY: Part = 2
"""In host memory, or on its way out or in."""


class RequestStatus(enum.Enum):
    """Where a request stands in its life."""

    ACTIVE = "active"
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"
    FAILED = "failed"
    """What served it failed."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a request ends. Hidden from schedulers: in a replay, `max_tokens` is the future."""

    max_tokens: int = 16
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    """With temperature > 0, a token depends on this and its position only, not on the batch it ran in."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_int("max_tokens", self.max_tokens, 1)
        require_int("top_k", self.top_k, 0)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p!r}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(slots=True, eq=False)
class Request:
    """One generation job as a scheduler sees it.

    `num_tokens` counts the prompt and what has been generated; `num_computed_tokens` counts those whose keys and
    values are in the cache. Whatever is between them is what the next iterations must compute: a fresh prompt, the
    rest of a chunked one, a recomputation after a dropped cache, or the single token sampled last. There are no phases.
    """

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    """Prompt, then generated tokens; empty in a simulation."""
    max_output_tokens: int = 0
    """The bound a user declared or the model sets, for policies that reserve memory for it; not the real length."""
    num_tokens: int = field(init=False)
    num_computed_tokens: int = field(init=False, default=0)
    status: RequestStatus = field(init=False, default=RequestStatus.ACTIVE)
    in_flight: bool = field(init=False, default=False)
    """Part of an iteration that was submitted and not yet collected."""
    level: int = field(init=False, default=0)
    """Queue it stands in, smaller is more urgent; stays 0 in policies with one queue."""
    position: int = field(init=False, default=0)
    """Place in that queue, smaller is nearer the front. Kept, with `part` and `level`, by the scheduler's queue."""
    part: Part = field(init=False, default=0)
    num_tokens_at_swap_in: int = field(init=False, default=-1)
    """Computed tokens when its cache last came back to the GPU: as many still, and it has not run since."""
    cache_capacity: int = field(init=False, default=0)
    """Tokens its cache has room for, 0 unless that is wholly on the GPU. Kept by the KVCacheManager."""
    standing: Any = field(init=False, default=None, repr=False)
    """Belongs to the scheduling policy: whatever it needs to know of the request to order it."""

    def __post_init__(self) -> None:
        require_int(f"request {self.request_id}: num_prompt_tokens", self.num_prompt_tokens, 1)
        self.num_tokens = self.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token is in the cache, so that one token is all there is to compute."""
        return self.num_tokens - self.num_computed_tokens == 1 and self.num_computed_tokens > 0

    @classmethod
    def from_tokens(cls, request_id: str, arrival_s: float, token_ids: Sequence[int]) -> Request:
        """A request for a real executor, which needs the prompt itself."""
        return cls(request_id, arrival_s, len(token_ids), list(token_ids))
