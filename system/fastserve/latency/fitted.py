"""Iteration time as a function of what the iteration computes, fitted to measurements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class PrefillFit:
    """`constant + per_token * sum(len) + per_token_squared * sum(len^2)`, in seconds."""

    constant: float
    per_token: float
    per_token_squared: float

    def plus(self, seconds: float, per_token: float = 0.0) -> PrefillFit:
        """The same, with so much more for every iteration and for every token of it."""
        return replace(self, constant=self.constant + seconds, per_token=self.per_token + per_token)


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """A measured curve over the number of tokens, `+ per_token_squared * sum(len^2)`, in seconds.

    On a GPU the time of the matrix products is no line: while they wait for the weights it is nearly flat, then it
    rises in the steps in which they cut their work. The curve is linear between its points, as its first one before
    them, and goes on after the last as the line from half as many tokens to the last.
    """

    num_tokens: tuple[int, ...]
    """Ascending, at least one."""
    seconds: tuple[float, ...]
    """At each of them, without the attention that `per_token_squared` prices."""
    per_token_squared: float

    def plus(self, seconds: float, per_token: float = 0.0) -> PrefillCurve:
        """The same, with so much more for every iteration and for every token of it."""
        points = zip(self.num_tokens, self.seconds, strict=True)
        return replace(self, seconds=tuple(value + seconds + per_token * number for number, value in points))

    def of_tokens(self, num_tokens: int) -> float:
        """Seconds for so many tokens, without attention."""
        known, seconds = self.num_tokens, self.seconds
        right = bisect_left(known, num_tokens)
        if not right:
            return seconds[0]
        left = right - 1
        if right == len(known):  # A step between the last two points says little about those to come.
            if not left:
                return seconds[0]
            right, left = left, min(bisect_left(known, known[left] / 2), left - 1)
        slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
        if num_tokens > known[-1]:
            slope = max(slope, 0.0)  # Noise may tilt the last points, and times far beyond must not fall to 0.
        return seconds[right] + slope * (num_tokens - known[right])


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """`constant + per_context_token * sum(context) + per_request * batch`, in seconds, up to a batch size."""

    constant: float
    per_context_token: float
    per_request: float
    max_batch_size: int | None = None
    """Largest batch this fit is for; None is without bound."""

    def plus(self, seconds: float, per_request: float = 0.0) -> DecodeFit:
        """The same, with so much more for every iteration and for every request of it."""
        return replace(self, constant=self.constant + seconds, per_request=self.per_request + per_request)


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
