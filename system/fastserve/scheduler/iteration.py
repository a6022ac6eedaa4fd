"""Iteration, a scheduler's decision, and IterationResult, what came of it. Neither changes once made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastserve.core.logprobs import Scores
from fastserve.core.request import Request
from fastserve.kvcache import Transfer


class Drop(NamedTuple):
    """A request whose cache was dropped, and the computed tokens that were lost with it."""

    request: Request
    num_lost_tokens: int
    num_recomputed_tokens: int
    """Those of them that are sure to be computed again: all, or, with prefix caching, 0 until a Reuse says more."""


class Reuse(NamedTuple):
    """A request that begins or resumes without a cache, with prefix caching."""

    request: Request
    num_found_tokens: int
    """Tokens that it need not compute, since blocks still hold them."""
    num_lost_tokens: int
    """Tokens that it had computed when its cache was dropped; 0 if it never was."""

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens that must be computed again."""
        return max(0, self.num_lost_tokens - self.num_found_tokens)


class Iteration:
    """What runs next, and what moves meanwhile.

    Without `requests` it is the decision to wait.
    """

    __slots__ = (
        "dropped",
        "num_scheduled_tokens",
        "padded",
        "preempted",
        "requests",
        "reused",
        "stalled",
        "swap_in",
        "swap_out",
    )

    def __init__(
        self,
        requests: tuple[Request, ...] = (),
        num_scheduled_tokens: tuple[int, ...] = (),
        swap_out: tuple[Transfer, ...] = (),
        swap_in: tuple[Transfer, ...] = (),
        dropped: tuple[Drop, ...] = (),
        preempted: tuple[Request, ...] = (),
        stalled: tuple[Request, ...] = (),
        padded: bool = False,
        reused: tuple[Reuse, ...] = (),
    ) -> None:
        self.requests = requests
        self.num_scheduled_tokens = num_scheduled_tokens
        """Tokens computed for each of `requests`: a prompt, a chunk of one, 1, or 0 for a row of padding."""
        self.swap_out = swap_out
        self.swap_in = swap_in
        self.dropped = dropped
        self.preempted = preempted
        """Unfinished requests that held a place in the batch and lost it."""
        self.stalled = stalled
        """Requests that were due and do not run, because of a transfer that has not ended."""
        self.padded = padded
        """Every prompt takes the time of the longest and every decode token that of the longest context."""
        self.reused = reused
        """Requests that found part of a dropped cache, or lost all of it; empty without prefix caching."""


class IterationResult:
    """What came of an iteration. Times are in seconds."""

    __slots__ = ("end_s", "scores", "start_s", "tokens")

    def __init__(
        self, tokens: Sequence[int], start_s: float, end_s: float, scores: Mapping[int, Scores] | None = None
    ) -> None:
        self.tokens = tokens
        """One per request of the iteration, in its order; meaningless where the prompt is not yet wholly computed."""
        self.start_s = start_s
        self.end_s = end_s
        self.scores = scores
        """Log probabilities, by a request's place in the iteration, of those that ask for some; None: none does."""
