"""Run to completion: static batches, as FasterTransformer serves them."""

from __future__ import annotations

from typing import Any

from baselines.orca import ReservingOrder
from fastserve.core.request import Request, RequestStatus
from fastserve.scheduler import Iteration, register
from fastserve.scheduler.iteration import IterationResult
from fastserve.scheduler.plan import IterationPlan


@register
class RunToCompletion(ReservingOrder):
    """A batch of those waiting is formed, and runs, padded, until its longest member ends; then the next is formed.

    Prompts are padded to the longest prompt, and a member that has ended stays as a row of padding: its result is
    returned with the batch. Whoever arrives meanwhile waits. In a pipeline there are as many such batches as stages.
    """

    name = "run-to-completion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[list[Request]] = []

    def on_remove(self, request: Request) -> None:
        """Leave its batch, which ends with its last member."""
        batch: list[Request] | None = request.policy_state
        if batch is not None:
            batch.remove(request)
            if not batch:
                self._batches.remove(batch)

    def decide(self, now: float) -> Iteration:
        """The next iteration of a batch that is not in flight, or the first of a new one."""
        plan = IterationPlan(self, now)
        batch = next((batch for batch in self._batches if not any(request.in_flight for request in batch)), None)
        if batch is not None:
            for request in batch:
                if request.status is RequestStatus.ACTIVE:
                    plan.offer(request)
                else:
                    plan.offer_padding(request)
        elif len(self._batches) < self.config.pipeline_depth:
            self.fill(plan)
            if plan.batch:
                batch = list(plan.batch)
                self._batches.append(batch)
                for request in batch:
                    request.policy_state = batch
        return plan.close(padded=True)

    def update(self, iteration: Iteration, result: IterationResult) -> list[Request]:
        """Members leave together when all have ended; nobody can use their places earlier."""
        batch: list[Request] = iteration.requests[0].policy_state
        leaving = [request for request in iteration.requests if request.status is RequestStatus.ABORTED]
        for request in leaving:
            self._remove(request)
        ended = [request for request in batch if request.status is RequestStatus.FINISHED]
        if len(ended) == len(batch):
            for request in ended:
                self._remove(request)
            return leaving + ended
        for request in ended:
            self.kv.release(request)
        return leaving
