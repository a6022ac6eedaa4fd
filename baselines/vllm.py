"""vLLM's default scheduling in the versions the paper compares with (0.1.7, 0.6); Kwon et al., SOSP'23, section 4.5."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastserve.core.config import SchedulerConfig
from fastserve.core.request import SWAPPED_OUT, Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.policies.fcfs import WATERMARK, ArrivalOrder
from fastserve.scheduler import Batch, PolicyOptions, register
from fastserve.scheduler.batch import DEFAULT_TERMS, TAKEN


@dataclass(frozen=True)
class VLLMOptions(PolicyOptions):
    """What happens to the newest running request when memory runs out."""

    swap: Literal["recompute", "reactive"] = "recompute"
    """Whether its cache is dropped and recomputed, which is vLLM's default, or swapped."""


class WaitingAndRunning(ArrivalOrder):
    """Base of vLLM's policies: waiting requests are admitted from the front and run until they end or lose their cache.

    In a pipeline, vLLM gives each iteration in flight a scheduler of its own, with a fixed share of the cache and of
    the requests. Here one list of running requests, with places for all iterations in flight, and one pool serve all:
    an iteration takes the requests of the list that are not in flight. So no share is idle while another is full, which
    favours the baseline.
    """

    keeps_places = True

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        latency: LatencyModel,
        options: PolicyOptions,
        *,
        watermark: float = WATERMARK,
    ) -> None:
        super().__init__(config, kv, latency, options, watermark=watermark)
        self._queued: OrderedDict[str, Request] = OrderedDict()

    def on_add(self, request: Request) -> None:
        """Wait at the end."""
        super().on_add(request)
        self._queued[request.request_id] = request

    def on_remove(self, request: Request) -> None:
        """Forget the request."""
        self._queued.pop(request.request_id, None)

    def on_start(self, request: Request, now: float) -> None:
        """Admit the request."""
        del self._queued[request.request_id]

    def on_preempt(self, request: Request, now: float) -> None:
        """Return to the front, in order of arrival.

        The newest running request comes before all that wait; but in a pipeline it may have been in flight, and an
        older request lost its cache instead.
        """
        older = list(itertools.takewhile(lambda other: self.queue.is_before(other, request), self._queued.values()))
        self._queued[request.request_id] = request
        for first in (request, *reversed(older)):
            self._queued.move_to_end(first.request_id, last=False)


@register
class VLLM(WaitingAndRunning):
    """First come, first served on a paged cache, prompts before decoding.

    While a waiting prompt fits, an iteration runs prompts only and the running requests pause; otherwise all running
    requests decode one token. A request keeps its place in the batch until it ends. When a decode step finds no free
    block, the newest running request gives up its cache and waits, at its old place in the order of arrival.
    """

    name = "vllm"
    Options = VLLMOptions

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: VLLMOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        self._resumes = False

    def fill(self, batch: Batch) -> bool:
        """Prompts if any can be admitted, else a decode step of all running requests."""
        batch.places = min(self.config.num_places - len(self.running), self.config.max_batch_size)
        self._admit(batch, swapped=False)
        if not batch.requests:
            batch.places = self.config.max_batch_size
            for request in self.running.values():
                batch.offer(request)
            num_decoding = len(batch.requests)
            self._admit(batch, swapped=True)
            self._resumes = len(batch.requests) > num_decoding
        return True

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """All of them, unless a swapped-out request was admitted before a prompt, which may be next."""
        return 1 if self._resumes else super().repeats(times, is_clear)

    def _admit(self, batch: Batch, *, swapped: bool) -> None:
        """Take waiting requests from the front: swapped-out ones, or ones with a whole prompt to compute."""
        for request in self._queued.values():
            if (request.cache_state == SWAPPED_OUT or request.is_decoding) is not swapped:
                break
            # If no request runs, nothing that a later request holds may keep the first from starting.
            alone = not batch.requests and not self.running
            if batch.offer(request, DEFAULT_TERMS if alone else self.admission) is not TAKEN:
                break
