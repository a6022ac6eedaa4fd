"""Iteration time as a linear model of what the iteration computes, fitted to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds for one iteration; 0 for an empty one.

        A chunk of n tokens over a prefix of p attends to (n + p)^2 - p^2 pairs where a prompt of n attends to n^2;
        the fits are of whole prompts, so this too is our assumption.
        """
        constant = work = 0.0
        if decode_context_lens:
            batch = len(decode_context_lens)
            fit = self._decode_fit(batch)
            constant = fit.constant
            work = fit.per_context_token * sum(decode_context_lens) + fit.per_request * batch
        if prefill_lens:
            prefill = self.prefill
            if prefill.constant > constant:
                constant = prefill.constant
            pairs = sum([length * length for length in prefill_lens])
            if prefix_lens:
                pairs += 2 * sum([length * prefix for length, prefix in zip(prefill_lens, prefix_lens, strict=True)])
            work += prefill.per_token * sum(prefill_lens)
            work += prefill.per_token_squared * pairs
        return constant + work

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """What `iteration_time` gives for `count` decode iterations in a row, to the bit."""
        batch = len(context_lens)
        fit = self._decode_fit(batch)
        contexts = np.arange(count, dtype=np.int64) * batch + sum(context_lens)
        return fit.constant + (fit.per_context_token * contexts + fit.per_request * batch)

    def _decode_fit(self, batch: int) -> DecodeFit:
        for fit in self.decode:
            if fit.max_batch_size is None or batch <= fit.max_batch_size:
                return fit
        return self.decode[-1]
