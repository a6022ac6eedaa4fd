"""Iteration time as a linear model of what the iteration computes, fitted to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillFit:
    """`constant + per_token * sum(len) + per_token_squared * sum(len^2)`, in seconds."""

    constant: float
    per_token: float
    per_token_squared: float


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """`constant + per_context_token * sum(context) + per_request * batch`, in seconds, up to a batch size."""

    constant: float
    per_context_token: float
    per_request: float
    max_batch_size: int | None = None
    """Largest batch this fit is for; None is without bound."""


@dataclass(frozen=True, slots=True)
class FittedLatency:
    """LatencyModel from a prefill fit and decode fits by batch size (ascending, the last one unbounded).

    An iteration that mixes prompts and decode tokens reads the weights once, so it pays the larger of the two
    constants and the sum of everything else. The source fits measured only pure iterations; this is our assumption.
    """

    prefill: PrefillFit
    decode: tuple[DecodeFit, ...]

    def iteration_time(self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int]) -> float:
        """Seconds for one iteration; 0 for an empty one."""
        constant = work = 0.0
        if decode_context_lens:
            batch = len(decode_context_lens)
            for fit in self.decode:
                if fit.max_batch_size is None or batch <= fit.max_batch_size:
                    break
            constant = fit.constant
            work = fit.per_context_token * sum(decode_context_lens) + fit.per_request * batch
        if prefill_lens:
            prefill = self.prefill
            if prefill.constant > constant:
                constant = prefill.constant
            work += prefill.per_token * sum(prefill_lens)
            work += prefill.per_token_squared * sum([length * length for length in prefill_lens])
        return constant + work
