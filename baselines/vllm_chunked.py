"""vLLM with chunked prefill (Agrawal et al., Sarathi-Serve, OSDI'24; vLLM 0.6's `enable_chunked_prefill`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from baselines.vllm import WaitingAndRunning
from fastserve.core.checks import require_int
from fastserve.scheduler import Iteration, register
from fastserve.scheduler.plan import IterationPlan


@dataclass(frozen=True, slots=True)
class VLLMChunkedOptions:
    """Of its own, it has the size of a chunk."""

    chunk_tokens: int = 512
    """Tokens of an iteration, decoded and prefilled together (never above the engine's token_budget). vLLM 0.6's
    default: prompts are then slow to finish, and no decode step waits long for one."""

    def __post_init__(self) -> None:
        require_int("chunk_tokens", self.chunk_tokens, 1)


@register
class VLLMChunked(WaitingAndRunning):
    """First come, first served; every iteration decodes all that run and fills up with chunks of prompts.

    No iteration computes more than `chunk_tokens` tokens, so a long prompt does not hold up those that decode. When
    memory runs out, the newest running request is dropped and recomputed, from its old place in the order.
    """

    name = "vllm-chunked"
    Options = VLLMChunkedOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_per_iteration = min(self.options.chunk_tokens, self.config.token_budget)

    def decide(self, now: float) -> Iteration:
        """Those that run, then those that wait, each as far as the tokens go."""
        plan = IterationPlan(self, now)
        left = self.tokens_per_iteration
        # Whoever decodes goes first: it needs one token, and a chunk takes what there is.
        for request in sorted(self.running.values(), key=lambda request: not request.is_decoding):
            if left:
                left -= plan.offer_chunk(request, left)
        # Nobody new in an iteration that takes cache away: whoever lost it comes first.
        for request in () if plan.evicts else self._waiting.values():
            alone = not plan.batch and not self.running
            if not left or not (
                taken := plan.offer_chunk(
                    request, left, may_evict=alone, keep_free=0 if alone else self.watermark_blocks
                )
            ):
                break
            left -= taken
        return plan.close(others_keep_their_place=True)
