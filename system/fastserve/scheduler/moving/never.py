"""swap=none: caches stay where they are."""

from __future__ import annotations

from fastserve.core.request import Request
from fastserve.scheduler.batch import Terms
from fastserve.scheduler.moving.base import CacheMover


class MoveNever(CacheMover):
    """A request gets free blocks or waits; the batch runs without those left out."""

    offers_swapped_out = False

    def find_room(self, request: Request, num_tokens: int, terms: Terms) -> bool:
        """Give the request free blocks; False if they do not suffice."""
        return self._take_free(request, num_tokens, terms)
