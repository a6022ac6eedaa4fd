"""The interface that serves a simulation as truth and a scheduler as forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class LatencyModel(Protocol):
    """Predicts the duration of one iteration."""

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds for an iteration that computes these prompts (tokens each) and one token for each of these contexts.

        A context length counts the tokens attended to, the new one included. `prefix_lens` is given when some of the
        prompts are chunks: for each prompt, the tokens before it that are in the cache already.
        """
        ...


def decode_times(model: LatencyModel, context_lens: Sequence[int], count: int) -> np.ndarray:
    """Seconds of each of `count` decode iterations in a row, every context growing by one token each time.

    The same floating-point numbers as `count` calls of `iteration_time`; a model that offers `decode_times` computes
    them at once.
    """
    at_once = getattr(model, "decode_times", None)
    if at_once is not None:
        return at_once(context_lens, count)
    times = [model.iteration_time((), [length + step for length in context_lens]) for step in range(count)]
    return np.array(times, dtype=float)
