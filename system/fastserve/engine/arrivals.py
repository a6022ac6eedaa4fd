"""Arrivals: the requests that a run serves, taken one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from fastserve.core.request import Request, SamplingParams


class Arrival(NamedTuple):
    """A request that arrives at `request.arrival_s`."""

    request: Request
    params: SamplingParams


class Arrivals:
    """Requests yet to arrive. Holds the next one only; the others stay in the iterator that they come from."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        self._rest = iter(arrivals)
        self.next: Arrival | None = None
        self.next_s = -math.inf
        """When the next request arrives; infinite if there is none."""
        self._advance()

    def pop(self) -> Arrival:
        """Take the next request. Raises IndexError if there is none, ValueError if one is not in order of arrival."""
        arrival = self.next
        if arrival is None:
            raise IndexError("no request is left")
        self._advance()
        return arrival

    def _advance(self) -> None:
        self.next = next(self._rest, None)
        next_s = math.inf if self.next is None else self.next.request.arrival_s
        if next_s < self.next_s:
            raise ValueError(f"a request that arrives at {next_s} s follows one that arrives at {self.next_s} s")
        self.next_s = next_s
