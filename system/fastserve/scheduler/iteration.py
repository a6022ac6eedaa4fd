"""Iteration: a scheduler's decision, as immutable data."""

from __future__ import annotations

from typing import NamedTuple

from fastserve.kvcache import Transfer
from fastserve.request import Request


class Drop(NamedTuple):
    """A request whose cache was given up, and the computed tokens that were lost with it."""

    request: Request
    num_lost_tokens: int


class Iteration(NamedTuple):
    """What runs next, and what moves meanwhile.

    With `requests` empty it is a decision to wait.
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
    """Requests that were due to run and do not, because of a transfer that has not ended."""
    padded: bool = False
    """Every prompt takes the time of the longest and every decode token that of the longest context."""
