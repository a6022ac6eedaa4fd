"""The interface that serves a simulation as truth and a scheduler as forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LatencyModel(Protocol):
    """Predicts the duration of one iteration."""

    def iteration_time(self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int]) -> float:
        """Seconds for an iteration that computes these prompts (tokens each) and one token for each of these contexts.

        A context length counts the tokens attended to, the new one included.
        """
        ...
