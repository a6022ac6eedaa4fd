"""RangeGuard: how much of a simulation's time lies outside the range that its profile was measured in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastserve.core.request import Request
from fastserve.latency import MeasuredRange, OutsideRange

_NO_BOUND = 1 << 60


class RangeGuard:
    """Adds up the computed time of a simulation, all of it and that of iterations outside the measured range.

    The time is that of the first stage. An iteration is outside if it leaves any bound.
    """

    def __init__(self, measured: MeasuredRange) -> None:
        self.measured = measured
        self.computed_s = 0.0
        self.outside_s = 0.0
        self._iteration_tokens = _bound(measured.iteration_tokens)
        self._prompt_tokens = _bound(measured.prompt_tokens)
        self._decodes = _bound(measured.decodes)
        self._context_tokens = _bound(measured.context_tokens)
        # The largest that was seen, where it is beyond the bound.
        self._most_iteration_tokens = 0
        self._most_prompt_tokens = 0
        self._most_decodes = 0
        self._most_context_tokens = 0
        self._may_be_long = False
        """Whether a request was admitted that can leave the bound of prompts or of contexts. Until then no lengths are
        looked at: the largest of a batch takes longer to find than all else here."""

    @property
    def outside(self) -> OutsideRange:
        """What was found so far."""
        reached = {
            "iteration_tokens": self._most_iteration_tokens,
            "prompt_tokens": self._most_prompt_tokens,
            "decodes": self._most_decodes,
            "context_tokens": self._most_context_tokens,
        }
        return OutsideRange(
            self.outside_s / self.computed_s if self.computed_s else 0.0,
            {
                name: {"measured": getattr(self.measured, name), "reached": largest}
                for name, largest in reached.items()
                if largest
            },
        )

    def admit(self, num_tokens: int) -> None:
        """Take note of a request whose cache may grow to this many tokens."""
        if num_tokens > self._prompt_tokens or num_tokens > self._context_tokens:
            self._may_be_long = True

    def add(self, seconds: float, prefill_lens: list[int], context_lens: list[int], prefix_lens: list[int]) -> None:
        """Add an iteration, given as a LatencyModel takes it."""
        self.computed_s += seconds
        num_decodes = len(context_lens)
        is_outside = self._leaves_sizes(num_decodes, num_decodes + sum(prefill_lens) if prefill_lens else num_decodes)
        if self._may_be_long:
            for i, tokens in enumerate(prefill_lens):
                length = tokens + prefix_lens[i] if prefix_lens else tokens
                if length > self._prompt_tokens:
                    is_outside = True
                    self._most_prompt_tokens = max(self._most_prompt_tokens, length)
            longest = 0
            for context in context_lens:  # Compiled, a loop takes a quarter of `max`.
                if context > longest:
                    longest = context
            if longest > self._context_tokens:
                is_outside = True
                self._most_context_tokens = max(self._most_context_tokens, longest)
        if is_outside:
            self.outside_s += seconds

    def add_decodes(self, requests: Sequence[Request], times: np.ndarray) -> None:
        """Add decode iterations between consecutive times [count + 1]; `requests` are as before the first."""
        count, batch = len(times) - 1, len(requests)
        end = float(times[count])
        self.computed_s += end - float(times[0])
        num_inside = 0 if self._leaves_sizes(batch, batch) else count
        if self._may_be_long:
            longest = 0
            for request in requests:
                if request.num_tokens > longest:
                    longest = request.num_tokens
            if longest + count - 1 > self._context_tokens:
                num_inside = min(num_inside, max(self._context_tokens + 1 - longest, 0))
                self._most_context_tokens = max(self._most_context_tokens, longest + count - 1)
        if num_inside < count:
            self.outside_s += end - float(times[num_inside])

    def _leaves_sizes(self, num_decodes: int, num_tokens: int) -> bool:
        """Whether an iteration has too many decodes or tokens."""
        is_outside = False
        if num_decodes > self._decodes:
            is_outside = True
            self._most_decodes = max(self._most_decodes, num_decodes)
        if num_tokens > self._iteration_tokens:
            is_outside = True
            self._most_iteration_tokens = max(self._most_iteration_tokens, num_tokens)
        return is_outside


def _bound(bound: int | None) -> int:
    return _NO_BOUND if bound is None else bound
