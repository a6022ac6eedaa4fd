"""Executor: the interface between the engine and what computes its iterations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.request import Request, SamplingParams
from fastserve.kvcache import Transfer
from fastserve.scheduler.iteration import Iteration, IterationResult


class FinishedTransfer:
    """A transfer and when it took place (seconds)."""

    __slots__ = ("end_s", "start_s", "transfer")

    def __init__(self, transfer: Transfer, start_s: float, end_s: float) -> None:
        self.transfer: Transfer = transfer
        self.start_s: float = start_s
        self.end_s: float = end_s


@mypyc_attr(allow_interpreted_subclasses=True)
class Executor(ABC):
    """Computes iterations in the order submitted, and moves caches at the same time.

    A pipeline of N stages computes up to N iterations at a time. Each stage computes one at a time, in order; an
    iteration ends when the last stage ends it. Swaps are decided for the first stage, and every later stage repeats
    them with its part of the cache, as in the paper. A transfer ends when its last part ends.
    """

    max_in_flight: int = 1
    """Iterations that may be submitted and not yet collected: the number of stages."""
    has_logits: bool = True
    """Whether tokens come from a model's logits, so that log probabilities can be reported."""

    @property
    def can_submit(self) -> bool:
        """Whether the first stage is free, asked while fewer than `max_in_flight` iterations are in flight."""
        return True

    @property
    def can_collect(self) -> bool:
        """Whether the oldest iteration in flight has ended. Matters only if `max_in_flight` exceeds 1: otherwise the
        engine collects an iteration right after submitting it."""
        return False

    def add_request(  # noqa: B027 (optional hook)
        self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """Take a request into the system; `eos_token_ids` are the model's end-of-sequence tokens."""

    def remove_request(self, request: Request) -> None:  # noqa: B027 (optional hook)
        """Forget a request that has finished or was aborted."""

    @abstractmethod
    def submit(self, iteration: Iteration) -> None:
        """Start the iteration's transfers and, if it has requests, its computation. Does not wait."""

    @abstractmethod
    def collect(self) -> IterationResult:
        """Wait for the oldest iteration in flight and return its result."""

    @abstractmethod
    def wait(self, until: float) -> None:
        """Wait until a transfer or the oldest iteration ends, the first stage becomes free, or the clock reaches
        `until` (seconds), whichever comes first."""

    @abstractmethod
    def finished_transfers(self) -> list[FinishedTransfer]:
        """Transfers that have ended since the last call."""

    @property
    @abstractmethod
    def num_transfers_in_flight(self) -> int:
        """Transfers not yet returned by `finished_transfers`."""

    def predict_ends(self, iteration: Iteration, count: int, until: float) -> np.ndarray | None:
        """Ends (seconds) of the next `count` iterations, if each is this one with a token more for every request.

        Iterations that would start at or after `until`, or after the end of a transfer, are left out. None where times
        cannot be predicted.
        """
        return None

    def jumped(self, iteration: Iteration, times: np.ndarray) -> None:  # noqa: B027 (optional hook)
        """Take note that as many of the predicted iterations took place as lie between consecutive `times` (seconds).

        Called before the requests of `iteration`, the first of them, advance.
        """

    def close(self) -> None:  # noqa: B027 (optional hook)
        """Release threads, processes and memory."""
