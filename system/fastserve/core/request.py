"""A request: as its user sees it (SamplingParams), and as a scheduler sees it (Request)."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError
from fastserve.core.logprobs import MOST_LOGPROBS

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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens, when to end, and which log probabilities to report. Names and meanings are vLLM's.

    Schedulers do not see them: in a replay, `max_tokens` is the output length. A token depends on its request's own
    logits, parameters, seed, position and tokens, never on the rest of the batch.

    Raises ConfigError, which names the field, for a value out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    """With temperature > 0, the same seed draws the same tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    """Outputs for one prompt; output i draws with `seed + i`. A request is one output: `LLM` and the server make n."""
    min_p: float = 0.0
    """Do not draw tokens whose probability is below this share of the most likely token's."""
    min_tokens: int = 0
    """Generate this many tokens before the end of sequence or a stop token can be drawn."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Draw only from these tokens; None allows all."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these token ids, -100 to 100."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was generated before, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or output, and multiplies negative logits."""
    logprobs: int | None = None
    """Report log probabilities: of each new token and of this many most likely tokens, up to 20. None: do not."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    include_stop_str_in_output: bool = False
    """Whether the text includes the stop text or the stop token's text that ended it."""
    truncate_prompt_tokens: int | None = None
    """Use only this many tokens at the prompt's end; -1: as many as fit. `LLM` and the server cut the prompt."""

    def __post_init__(self) -> None:
        require_int("max_tokens", self.max_tokens, 1)
        require_int("top_k", self.top_k, 0)
        require_int("n", self.n, 1)
        require_int("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], got {self.min_p!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= (penalty := getattr(self, name)) <= 2:
                raise ConfigError(f"{name} must be in [-2, 2], got {penalty!r}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty must be a finite number above 0, got {self.repetition_penalty!r}")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                require_int(name, count, 0)
                if count > MOST_LOGPROBS:
                    raise ConfigError(f"{name} must be at most {MOST_LOGPROBS}, got {count}")
        if self.truncate_prompt_tokens not in (None, -1):
            require_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ConfigError("allowed_token_ids is empty, so no token can be drawn; leave it out or name some")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
            for token, bias in self.logit_bias.items():
                if not -100 <= bias <= 100:
                    raise ConfigError(f"logit_bias of token {token} must be in [-100, 100], got {bias!r}")

    @property
    def asks_logprobs(self) -> bool:
        """Whether to report any log probability."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def conflict(self, vocab_size: int | None, eos_token_ids: Sequence[int] = ()) -> tuple[str, str] | None:
        """A field that no model with that vocabulary can satisfy, and why; None if there is none.

        `vocab_size` is None if it is unknown, as in a simulation, which draws no tokens.
        """
        if vocab_size is None:
            return None
        for name in ("allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    return name, f"{name}: token id {token}; the model's vocabulary has ids from 0 to {vocab_size - 1}"
        if self.min_tokens and self.allowed_token_ids is not None:
            ends = {*self.stop_token_ids, *eos_token_ids}
            if ends.issuperset(self.allowed_token_ids):
                return "allowed_token_ids", (
                    f"allowed_token_ids has only tokens that end the output, which min_tokens={self.min_tokens} keeps "
                    "back; allow another or leave min_tokens out"
                )
        return None


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
