"""Fits of a prompt's and a decode step's time: the terms that profiles store."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace


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
