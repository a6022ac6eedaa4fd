"""vLLM's default scheduling in the versions the paper compares with (0.1.7, 0.6); Kwon et al., SOSP'23, section 4.5."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastserve.core.request import SWAPPED_OUT, Request
from fastserve.policies.fcfs import ArrivalOrder
from fastserve.scheduler import Iteration, register
from fastserve.scheduler.plan import IterationPlan


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """The newest running request gives up its cache when memory runs out, and nobody at any other time."""

    swap: Literal["recompute", "reactive"] = "recompute"
    """Whether it is dropped and recomputed, which is vLLM's default, or swapped."""


class WaitingAndRunning(ArrivalOrder):
    """Base of vLLM's policies: who waits is let in from the front, and runs until its end or the loss of its cache.

    In a pipeline, vLLM gives each iteration in flight a scheduler of its own, with a share of the cache and of the
    requests for good. Here one list of those running, with places for all iterations in flight, and one pool serve
    them all: an iteration takes those of the list who are not in flight. So no share lies idle while another is full,
    which is better for the baseline than what it does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: OrderedDict[str, Request] = OrderedDict()

    def on_add(self, request: Request) -> None:
        """Wait at the end."""
        super().on_add(request)
        self._waiting[request.request_id] = request

    def on_remove(self, request: Request) -> None:
        """Forget."""
        self._waiting.pop(request.request_id, None)

    def on_start(self, request: Request, now: float) -> None:
        """Admitted."""
        del self._waiting[request.request_id]

    def on_preempt(self, request: Request, now: float) -> None:
        """Back to the front, in order of arrival.

        The newest running request comes before all that wait; but in a pipeline it may have been in flight, and an
        older one lost its cache instead.
        """
        older = list(itertools.takewhile(lambda other: self.queue.is_before(other, request), self._waiting.values()))
        self._waiting[request.request_id] = request
        for first in (request, *reversed(older)):
            self._waiting.move_to_end(first.request_id, last=False)


@register
class VLLM(WaitingAndRunning):
    """First come, first served on a paged cache, prompts before decoding.

    While a waiting prompt fits, an iteration runs prompts only and the running requests pause; otherwise all running
    requests decode one token. A request keeps its place in the batch until it ends. When a decode step finds no free
    block, the newest running request gives up its cache and waits, at its old place in the order of arrival.
    """

    name = "vllm"
    Options = VLLMOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumes = False

    def decide(self, now: float) -> Iteration:
        """Prompts if any can be admitted, else a decode step of all that run."""
        places = self.config.num_places - len(self.running)
        plan = IterationPlan(self, now, min(places, self.config.max_batch_size))
        self._admit(plan, swapped=False)
        if not plan.batch:
            plan = IterationPlan(self, now)
            for request in self.running.values():
                plan.offer(request)
            num_decoding = len(plan.batch)
            self._admit(plan, swapped=True)
            self._resumes = len(plan.batch) > num_decoding
        return plan.close(others_keep_their_place=True)

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """All of them, unless somebody swapped was let in before a prompt, which may be next."""
        return 1 if self._resumes else super().repeats(times, free_blocks)

    def _admit(self, plan: IterationPlan, *, swapped: bool) -> None:
        """Take requests from the front of the waiting ones: those that were swapped, or those with a whole prompt."""
        for request in self._waiting.values():
            if (request.cache_state == SWAPPED_OUT or request.is_decoding) is not swapped:
                break
            # With nobody running, whatever a later request holds must not keep the first from starting.
            alone = not plan.batch and not self.running
            if not plan.offer(request, may_evict=alone, keep_free=0 if alone else self.watermark_blocks):
                break
