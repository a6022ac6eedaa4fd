"""The interface between the engine and whatever executes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastserve.core.request import Request, SamplingParams
from fastserve.kvcache import Transfer
from fastserve.scheduler.iteration import Iteration, IterationResult


class FinishedTransfer(NamedTuple):
    """A transfer and when it took place."""

    transfer: Transfer
    start_s: float
    end_s: float


class Executor(ABC):
    """Carries out iterations in the order submitted, and transfers on their own, beside the computation.

    A pipeline of several stages works on as many iterations at a time. Each stage is busy with one at most and takes
    them in order; an iteration ends when the last stage ends it. Swaps are decided for the first stage, and every
    later one repeats them with its part of the cache, as in the paper: a transfer has ended when its last part has.
    """

    max_in_flight: int = 1
    """Iterations that may be submitted and not yet collected: 1, or the depth of the pipeline."""
    has_logits: bool = True
    """Whether tokens are drawn from a model's logits, so that log probabilities can be told."""

    @property
    def can_submit(self) -> bool:
        """Whether the first stage is free. Asked while fewer than `max_in_flight` iterations are in flight: always so
        where that is 1."""
        return True

    @property
    def can_collect(self) -> bool:
        """Whether the oldest iteration in flight has ended. Where `max_in_flight` is 1, nobody needs to know: the
        engine has nothing else to do than to collect it."""
        return False

    def add_request(  # noqa: B027 (optional hook)
        self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """A request enters the system; `eos_token_ids` are the model's."""

    def remove_request(self, request: Request) -> None:  # noqa: B027 (optional hook)
        """A request has finished or was aborted."""

    @abstractmethod
    def submit(self, iteration: Iteration) -> None:
        """Start the iteration's transfers and, if it has requests, its computation. Does not wait."""

    @abstractmethod
    def collect(self) -> IterationResult:
        """Wait for the oldest computation submitted and return what came of it."""

    @abstractmethod
    def wait(self, until: float) -> None:
        """Wait until a transfer or the oldest iteration ends, the first stage becomes free, or the clock reaches
        `until`, whichever is first."""

    @abstractmethod
    def finished_transfers(self) -> list[FinishedTransfer]:
        """Transfers that have ended since last asked."""

    @property
    @abstractmethod
    def num_transfers_in_flight(self) -> int:
        """Transfers under way."""

    def foresee(self, iteration: Iteration, count: int, until: float) -> np.ndarray | None:
        """Ends of the next `count` iterations, if they are this one with a token more for each request every time.

        Seconds, fewer than `count` if the iterations after those would start at or after `until` or the end of a
        transfer. None where time cannot be known in advance.
        """
        return None

    def close(self) -> None:  # noqa: B027 (optional hook)
        """Give back threads, processes and memory."""
