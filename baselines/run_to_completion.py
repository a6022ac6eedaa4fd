"""Run to completion: static batches, as FasterTransformer serves them."""

from __future__ import annotations

from collections.abc import Sequence

from baselines.orca import ReservingOptions, ReservingOrder
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import Request, RequestStatus
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.scheduler import Batch, register


@register
class RunToCompletion(ReservingOrder):
    """A batch of the waiting requests is formed, and runs, padded, until its longest member ends; then the next one.

    Prompts are padded to the longest prompt, and a member that has ended stays as a row of padding: its result is
    returned with the batch. Requests that arrive meanwhile wait. A pipeline has as many such batches as stages.
    """

    name = "run-to-completion"
    padded = True

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: ReservingOptions
    ) -> None:
        super().__init__(config, kv, latency, options)
        self._batches: list[list[Request]] = []
        self._new: list[Request] = []
        """The batch that the current decision forms."""

    def fill(self, batch: Batch) -> bool:
        """Take the members of a static batch that is not in flight; otherwise form a new one, in order."""
        members = next((each for each in self._batches if not any(request.in_flight for request in each)), None)
        if members is None:
            self._new = []
            return len(self._batches) >= self.config.pipeline_depth
        for request in members:
            if request.status is RequestStatus.ACTIVE:
                batch.offer(request)
            else:
                batch.add_padding(request)
        return True

    def on_start(self, request: Request, now: float) -> None:
        """Join the batch that is formed."""
        if not self._new:
            self._batches.append(self._new)
        self._new.append(request)
        request.policy_state = self._new

    def on_remove(self, request: Request) -> None:
        """Leave the batch, which ends with its last member."""
        members: list[Request] | None = request.policy_state
        if members is not None:
            members.remove(request)
            if not members:
                self._batches.remove(members)

    def leaving(self, request: Request) -> Sequence[Request]:
        """Members leave together when all have ended; no other request can use their places earlier."""
        members: list[Request] = request.policy_state
        if request not in members:
            return ()  # It left with the others.
        is_aborted = request.status is RequestStatus.ABORTED
        others = [other for other in members if not (is_aborted and other is request)]
        left = [request] if is_aborted else []
        if all(other.status is RequestStatus.FINISHED for other in others):
            return left + others
        if not is_aborted:
            self.kv.release(request)
        return left
