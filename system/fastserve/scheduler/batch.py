"""Batch: fills one iteration within its places, its token budget and the room for caches."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from fastserve.core.request import NO_CACHE, RESIDENT, Request


class Outcome(enum.Enum):
    """What came of offering a request to a batch."""

    TAKEN = enum.auto()
    FULL = enum.auto()
    """Nothing changed: no place is left, or the request is in flight."""
    BEYOND_BUDGET = enum.auto()
    """Nothing changed: its prompt exceeds what is left of the token budget."""
    NO_ROOM = enum.auto()
    """There is no room to bring its cache to the GPU. A request offered later must not take what this one waits for."""
    NO_GROWTH = enum.auto()
    """Its cache is on the GPU and there is no room for its next tokens."""


# Faster to look up than members of the class.
TAKEN, FULL, BEYOND_BUDGET, NO_ROOM, NO_GROWTH = Outcome


class Terms(NamedTuple):
    """On which terms a request may take room for its cache."""

    may_evict: bool = True
    """Whether requests that rank behind it may lose their cache for it."""
    keep_free: int = 0
    """Blocks that must stay free."""
    hold_tokens: int = 0
    """Tokens to make room for, if more than it computes next."""
    or_drop: bool = False
    """swap=recompute: whether a request that may evict and still finds no room to grow loses its own cache."""


DEFAULT_TERMS = Terms()

FindRoom = Callable[[Request, int, Terms], bool]
"""Get the request onto the GPU with room for so many tokens, now or once transfers have ended; False if it cannot."""


FindCached = Callable[[Request], int]
"""Tokens that a request without a cache need not compute, if it gets room now."""


class Batch:
    """The requests of the next iteration and how many tokens each computes.

    Requests are offered most urgent first; each is taken, or left out with nothing changed.
    """

    __slots__ = (
        "_num_prefills",
        "_tokens_left",
        "find_cached",
        "find_room",
        "lost",
        "num_tokens",
        "places",
        "requests",
    )

    def __init__(
        self, places: int, token_budget: int, find_room: FindRoom, find_cached: FindCached | None = None
    ) -> None:
        self.places = places
        """The most requests it takes."""
        self.find_room = find_room
        self.find_cached = find_cached
        """None: requests without a cache have everything to compute."""
        self.requests: list[Request] = []
        self.num_tokens: list[int] = []
        """Tokens that each of `requests` computes."""
        self.lost: list[Request] = []
        """Requests that lose their cache by this decision; `find_room` finds none for them."""
        self._tokens_left = token_budget
        self._num_prefills = 0

    @property
    def is_full(self) -> bool:
        """Whether no place is left."""
        return len(self.requests) >= self.places

    def take_if_ready(self, request: Request) -> bool:
        """Take a request, not in flight, that needs nothing but a place: one token to decode, and room for it."""
        num_tokens = request.num_tokens
        if num_tokens > request.cache_capacity or num_tokens - request.num_computed_tokens > 1:
            return False
        if not request.num_computed_tokens:  # A prompt of one token.
            return False
        self.requests.append(request)
        self.num_tokens.append(1)
        return True

    def offer(self, request: Request, terms: Terms = DEFAULT_TERMS, max_tokens: int | None = None) -> Outcome:
        """Take the request with all it has to compute (or `max_tokens` of that), if it fits."""
        if request.in_flight or len(self.requests) >= self.places:
            return FULL
        num_computed = request.num_computed_tokens
        if self.find_cached is not None and request.cache_state == NO_CACHE:
            num_computed = self.find_cached(request)
        num_tokens = request.num_tokens - num_computed
        if max_tokens is not None and num_tokens > max_tokens:
            num_tokens = max_tokens
        is_prefill = num_tokens > 1 or not num_computed
        # A prompt beyond the budget must run some time: as the only prompt of its iteration.
        if is_prefill and num_tokens > self._tokens_left and self._num_prefills:
            return BEYOND_BUDGET
        hold = num_computed + num_tokens
        if terms.hold_tokens > hold:
            hold = terms.hold_tokens
        if hold > request.cache_capacity and not self.find_room(request, hold, terms):
            return NO_GROWTH if request.cache_state == RESIDENT else NO_ROOM
        if is_prefill:
            self._num_prefills += 1
            self._tokens_left -= num_tokens
        self.requests.append(request)
        self.num_tokens.append(num_tokens)
        return TAKEN

    def offer_chunk(self, request: Request, max_tokens: int, terms: Terms = DEFAULT_TERMS) -> int:
        """Take the request with at most `max_tokens` of what it has to compute.

        Returns how many it computes, 0 if it does not fit.
        """
        return self.num_tokens[-1] if self.offer(request, terms, max_tokens) is TAKEN else 0

    def add_padding(self, request: Request) -> None:
        """Take a finished request as a row that is computed for nothing."""
        self.requests.append(request)
        self.num_tokens.append(0)

    def lose(self, request: Request) -> None:
        """The request loses its cache, and its place if it was taken."""
        if request in self.requests:
            index = self.requests.index(request)
            del self.requests[index], self.num_tokens[index]
        self.lost.append(request)
