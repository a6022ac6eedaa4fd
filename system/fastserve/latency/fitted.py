"""Iteration time as a function of what the iteration computes, fitted to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.latency.fits import DecodeFit, PrefillCurve, PrefillFit


@dataclass(frozen=True, slots=True)
class FittedLatency:
    """LatencyModel from a prefill fit and decode fits by batch size (ascending, the last one unbounded).

    An iteration that mixes prompts and decode tokens reads the weights once. By a line (`PrefillFit`) it pays the
    larger of the two constants and the sum of everything else; by a curve, the time of the tokens of both, and of the
    attention of both. The source fits measured only pure iterations; this is our assumption.
    """

    prefill: PrefillFit | PrefillCurve
    decode: tuple[DecodeFit, ...]

    def plus(self, seconds: float, per_token: float = 0.0) -> FittedLatency:
        """The same, with so much more for every iteration and for every token it computes, of prompts and decodes."""
        return FittedLatency(
            self.prefill.plus(seconds, per_token), tuple(fit.plus(seconds, per_token) for fit in self.decode)
        )

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
            pairs = sum([length * length for length in prefill_lens])
            if prefix_lens:
                pairs += 2 * sum([length * prefix for length, prefix in zip(prefill_lens, prefix_lens, strict=True)])
            if isinstance(prefill, PrefillCurve):
                constant = prefill.of_tokens(sum(prefill_lens) + len(decode_context_lens))
                work = fit.per_context_token * sum(decode_context_lens) if decode_context_lens else 0.0
            else:
                if prefill.constant > constant:
                    constant = prefill.constant
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
