"""Run to completion: static batches, as FasterTransformer serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baselines.orca import ReservingOrder
from fastserve.request import Request, RequestStatus
from fastserve.scheduler import Iteration, register
from fastserve.scheduler.plan import IterationPlan

if TYPE_CHECKING:
    from fastserve.executor.base import IterationResult


@register
class RunToCompletion(ReservingOrder):
    """A batch of those waiting is formed, and runs, padded, until its longest member ends; then the next is formed.

    Prompts are padded to the longest prompt, and a member that has ended stays as a row of padding: its result is
    returned with the batch. Whoever arrives meanwhile waits.
    """

    name = "run-to-completion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._members: list[Request] = []

    def on_remove(self, request: Request) -> None:
        """An aborted member leaves the batch."""
        if request in self._members:
            self._members.remove(request)

    def decide(self, now: float) -> Iteration:
        """The next iteration of the batch, or the first of a new one."""
        plan = IterationPlan(self, now)
        if not self._members:
            self.fill(plan)
            self._members = list(plan.batch)
        else:
            for request in self._members:
                if request.status is RequestStatus.ACTIVE:
                    plan.offer(request)
                else:
                    plan.offer_padding(request)
        return plan.close(padded=True)

    def update(self, iteration: Iteration, result: IterationResult) -> list[Request]:
        """Members leave together when all have ended; nobody can use their places earlier."""
        leaving = [request for request in iteration.requests if request.status is RequestStatus.ABORTED]
        for request in leaving:
            self._remove(request)
        ended = [request for request in self._members if request.status is RequestStatus.FINISHED]
        if len(ended) == len(self._members):
            for request in ended:
                self._remove(request)
            return leaving + ended
        for request in ended:
            self.kv.release(request)
        return leaving
