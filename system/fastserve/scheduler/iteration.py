"""Iteration, a scheduler's decision, and IterationResult, what came of it: immutable data."""

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


class Iteration(NamedTuple):
    """What runs next, and what moves meanwhile.

    Without `requests` it is the decision to wait.
    """

    requests: tuple[Request, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    """Tokens computed for each of `requests`: a prompt, a chunk of one, 1, or 0 for a row of padding."""
    swap_out: tuple[Transfer, ...] = ()
    swap_in: tuple[Transfer, ...] = ()
    dropped: tuple[Drop, ...] = ()
    preempted: tuple[Request, ...] = ()
    """Unfinished requests that held a place in the batch and lost it."""
    stalled: tuple[Request, ...] = ()
    """Requests that were due and do not run, because of a transfer that has not ended."""
    padded: bool = False
    """Every prompt takes the time of the longest and every decode token that of the longest context."""


class IterationResult(NamedTuple):
    """What came of an iteration."""

    tokens: Sequence[int]
    """One per request of the iteration, in its order; meaningless where the prompt is not yet wholly computed."""
    start_s: float
    end_s: float
    scores: Mapping[int, Scores] | None = None
    """Log probabilities, by a request's place in the iteration, of those that ask for some; None: none does."""
