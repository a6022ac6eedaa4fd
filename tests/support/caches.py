"""Putting requests and their caches where a test wants them."""

from fastserve.core.request import NO_CACHE, SWAPPED_OUT, CacheState, Request
from fastserve.scheduler import Scheduler


def place(
    scheduler: Scheduler, name: str, at: float, prompt: int, state: CacheState = NO_CACHE, level: int | None = None
) -> Request:
    """A request that has its cache there: all its prompt computed and one token generated, unless it has none.

    It stands where the policy puts it, or at the back of `level`.
    """
    request = Request(name, at, prompt)
    scheduler.add(request)
    if level is not None:
        policy, waiting = scheduler.policy, scheduler.policy.waiting
        scheduler.queue.move(request, level)
        waiting.end(request)
        if waiting.longest_wait_s is not None and policy.may_starve(request):
            waiting.start(request, at)
    kv = scheduler.kv
    if state != NO_CACHE:
        kv.extend(request, prompt)
        request.num_computed_tokens = prompt
        request.num_tokens += 1
    if state == SWAPPED_OUT:
        kv.complete(kv.begin_swap_out(request))
    if state != NO_CACHE:
        scheduler.queue.refile(request)
    return request


def start(scheduler: Scheduler, request: Request, now: float) -> None:
    """Give the request a place in the batch, as a decision at `now` does."""
    scheduler.running[request.request_id] = request
    scheduler.policy.waiting.end(request)
    scheduler.policy.on_start(request, now)
