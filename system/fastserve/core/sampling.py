"""SamplingParams: a request as its user sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError
from fastserve.core.logprobs import MOST_LOGPROBS


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
