"""Gittins index scheduling on lengths learned from what has finished: a policy of our own (docs/own-policy.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache import Transfer
from fastserve.policies.gittins.index import gittins_index
from fastserve.policies.gittins.lengths import LengthHistory, Stages, kind_of_prompt, prompt_of_kind
from fastserve.policies.gittins.queue import FIRST_OF_ALL, IndexQueue
from fastserve.scheduler.base import Scheduler
from fastserve.scheduler.iteration import Iteration
from fastserve.scheduler.registry import register
from fastserve.scheduler.swapping import MemoryOptions, PreemptiveOptions
from fastserve.scheduler.waiting import WaitList

STAGES = Stages()
_EXPONENTS = {"slowdown": 3.0, "jct": 1.0}
_REFRESHES_PER_MEMORY = 32
"""How often the index of a kind is computed anew while as many finish as are remembered, or were known before."""
_NEWEST_TRANSFER = 0.05
"""Share of the newest transfer in the running mean of what moving a token takes."""


@dataclass(frozen=True, slots=True)
class GittinsOptions(PreemptiveOptions):
    """What is minimized, and how the past counts."""

    objective: Literal["slowdown", "jct"] = "slowdown"
    """What a request suffers from: its completion time over its output length, or its completion time."""
    exponent: float | None = None
    """The power of that which is minimized in the mean. 1 is the plain mean; the higher, the more the worst off count,
    and so the time that one has waited. None takes 3 for slowdown and 1 for jct."""
    alpha_s: float | None = 0.3
    """Whoever has waited this many seconds comes first, as long as all of those fit one batch; none never does that."""
    memory_requests: float = 1000.0
    """Finished requests after which an old one counts 1/e: enough to know a distribution, few enough to follow it."""
    switching_cost: float = 1.0
    """How much of the measured time of a swap counts against one whose cache is away; 0 makes swapping free."""
    max_passed_over: int = 16
    """Prompts beyond the token budget that a decision passes over before it tries no more of them; bounds its cost."""

    def __post_init__(self) -> None:
        # Not super(): the class that slots=True makes is not the one this body was written in.
        MemoryOptions.__post_init__(self)
        if self.alpha_s is not None:
            require_positive("alpha_s", self.alpha_s)
        require_positive("memory_requests", self.memory_requests)
        require_int("max_passed_over", self.max_passed_over, 0)
        # Beyond, the longest answers would weigh less than the smallest number there is.
        if self.exponent is not None and not 1 <= self.exponent <= 10:
            raise ConfigError(f"exponent must be from 1 to 10, got {self.exponent!r}")
        if not 0 <= self.switching_cost < math.inf:
            raise ConfigError(f"switching_cost must be a finite number of at least 0, got {self.switching_cost!r}")


@dataclass(slots=True)
class _PolicyState:
    """Where a request stands in its life, and in its wait."""

    kind: int
    """That of its prompt."""
    stage: int = 0
    stage_ends: int = STAGES.ends[0]
    """Output tokens with which the next stage begins."""
    deadline: float = math.inf
    """When its current wait will have lasted alpha (s); infinite while it does not wait."""
    ended_s: float = 0.0
    """When its last iteration ended."""


@register
class Gittins(Scheduler):
    """Serves first whoever promises the most relief for the time it takes of the machine, as far as can be known.

    A request's Gittins index is the largest ratio, over how long it may be served, of the cost that its finishing is
    expected to end to the time until it finishes or is given up. What is expected rests on its prompt length and on
    the tokens it has produced: `LengthHistory` learns from every request how likely the next ones are to finish. A
    prompt not computed yet, and a cache that is away, are time to be spent before anything comes of it.

    The cost of a request is a power of its slowdown (or completion time) and grows while it waits, as in the
    generalized c-mu rule. Levels are the stages of a request's progress; level 0 is for those who have waited alpha.
    """

    name = "gittins"
    Options = GittinsOptions
    needs_latency = True
    learns = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: GittinsOptions = self.options
        self.max_passed_over = options.max_passed_over
        self.history = LengthHistory(STAGES, options.memory_requests)
        self._length_power = self.exponent if options.objective == "slowdown" else 0.0
        self._refreshed_at: list[int] = []
        """For each kind, how many requests had finished when its index was last computed."""
        self._costs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """For each kind, by stage, machine time of a token, and of computing the prompt and what was produced (s)."""
        self._step_s = self.latency.iteration_time((), (1,) * self.config.max_batch_size)
        self._token_transfer_s = 0.0
        """Measured: seconds the link needs to move the cache of a token, one way."""
        self._waiting = WaitList(options.alpha_s)
        self._starved: dict[str, Request] = {}
        """Those who have waited alpha and do not run."""
        self._are_first = False
        """Whether they come before all others."""

    @property
    def exponent(self) -> float:
        """The power of the slowdown or completion time that a request costs."""
        options: GittinsOptions = self.options
        return options.exponent or _EXPONENTS[options.objective]

    def make_queue(self) -> IndexQueue:
        """By index."""
        return IndexQueue(1 + len(STAGES), self.exponent - 1, lambda request: request.policy_state.kind)

    # -- what is learned ---------------------------------------------------------------------------------------

    def learn(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count a request that finished before this run."""
        kind = self._kind(num_prompt_tokens)
        last = STAGES.stage_of_finished(num_output_tokens)
        for stage in range(last):
            self.history.passed(kind, stage)
        self.history.finished(kind, last)

    def complete(self, transfer: Transfer, duration_s: float) -> None:
        """A transfer has ended: what swapping costs is measured on it."""
        super().complete(transfer, duration_s)
        per_token = duration_s / (len(transfer.source) * self.kv.block_size)
        newest = _NEWEST_TRANSFER if self._token_transfer_s else 1.0
        self._token_transfer_s += newest * (per_token - self._token_transfer_s)

    def _kind(self, num_prompt_tokens: int) -> int:
        """The kind of a prompt, made known if it is new."""
        kind = kind_of_prompt(num_prompt_tokens)
        while kind >= len(self._refreshed_at):
            self.history.add_kind()
            self.queue.add_kind()
            self._refreshed_at.append(-1)
        if self._refreshed_at[kind] < 0:
            self._refresh(kind)
        return kind

    def _price(self, num_prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Machine time (s) for requests with such prompts, by stage: of a token, its share of a full batch; and of
        computing the prompt and what was produced, beside a batch of their like."""
        time, places = self.latency.iteration_time, self.config.max_batch_size
        contexts = [num_prompt_tokens + start for start in STAGES.starts]
        of_token = np.array([time((), (context,) * places) for context in contexts]) / places
        others = (num_prompt_tokens,) * (places - 1)
        without = time((), (*others, num_prompt_tokens))
        return of_token, np.array([max(0.0, time((context,), others) - without) for context in contexts])

    def _refresh_if_stale(self, kind: int) -> None:
        seen, memory = self._refreshed_at[kind], self.options.memory_requests
        if self.history.num_finished - seen > min(seen, memory) / _REFRESHES_PER_MEMORY:
            self._refresh(kind)

    def _refresh(self, kind: int) -> None:
        """Compute the index of a kind from what is known by now."""
        self._refreshed_at[kind] = self.history.num_finished
        if kind not in self._costs:
            self._costs[kind] = self._price(prompt_of_kind(kind))
        token_costs, prompt_costs = self._costs[kind]
        setup_costs = np.zeros((len(STAGES), 3))
        setup_costs[:, NO_CACHE] = prompt_costs
        # While a cache moves out and back, its place in the batch stands empty at the worst.
        contexts = prompt_of_kind(kind) + np.array(STAGES.starts)
        moving_s = 2 * self._token_transfer_s * contexts
        setup_costs[:, SWAPPED_OUT] = self.options.switching_cost * moving_s / self.config.max_batch_size
        index = gittins_index(
            STAGES,
            self.history.hazards(kind),
            token_costs=token_costs,
            setup_costs=setup_costs,
            length_power=self._length_power,
            step_s=self._step_s,
        )
        self.queue.set_index(kind, index)

    # -- the life of a request ---------------------------------------------------------------------------------

    def on_add(self, request: Request) -> None:
        """Join, and start to wait."""
        kind = self._kind(request.num_prompt_tokens)
        self._refresh_if_stale(kind)
        request.policy_state = _PolicyState(kind)
        self.queue.join(request, 1)
        self._waiting.start(request, request.arrival_s)

    def on_start(self, request: Request, now: float) -> None:
        """Wait no longer."""
        self._end_wait(request)

    def on_preempt(self, request: Request, now: float) -> None:
        """Start to wait."""
        self._waiting.start_preempted(request, now)

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Move on when a stage of its life is over."""
        policy_state: _PolicyState = request.policy_state
        policy_state.ended_s = end
        num_output_tokens = request.num_output_tokens
        if num_output_tokens < policy_state.stage_ends and request.level:
            return
        while num_output_tokens >= policy_state.stage_ends and policy_state.stage < len(STAGES) - 1:
            self.history.passed(policy_state.kind, policy_state.stage)
            policy_state.stage += 1
            policy_state.stage_ends = STAGES.ends[policy_state.stage]
        self.queue.move(request, 1 + policy_state.stage)

    def on_remove(self, request: Request) -> None:
        """Learn from one that has finished. One that was aborted counts as far as it came."""
        self._end_wait(request)
        if request.status is RequestStatus.FINISHED:
            policy_state: _PolicyState = request.policy_state
            self.history.finished(policy_state.kind, policy_state.stage)
            self._refresh_if_stale(policy_state.kind)

    # -- starvation --------------------------------------------------------------------------------------------

    def prepare(self, now: float) -> None:
        """Let indices be those of now, and look who has waited too long."""
        self._waiting.decide(now)
        self.queue.now = now
        for request in self._waiting.due(now):
            self._waiting.end(request)
            self._starved[request.request_id] = request
        if self._starved or self._are_first:
            self._put_starved_first(self._fit_one_batch(self._starved))

    def _fit_one_batch(self, requests: dict[str, Request]) -> bool:
        """Whether these have room in one batch, and their caches in memory."""
        if len(requests) > self.config.max_batch_size:
            return False
        kv = self.kv
        room = kv.config.num_gpu_blocks - (self._swapping.most_reserved if self._swapping else 0)
        return sum([kv.blocks_for(request.num_tokens) for request in requests.values()]) <= room

    def _put_starved_first(self, first: bool) -> None:
        """With more of them than can be served at once nothing can be promised, and the index decides again."""
        if not first and not self._are_first:
            return
        self._are_first = first
        for request in self._starved.values():
            level = FIRST_OF_ALL if first else 1 + request.policy_state.stage
            if request.level != level:
                self.queue.move(request, level)

    def _end_wait(self, request: Request) -> None:
        self._waiting.end(request)
        self._starved.pop(request.request_id, None)

    # -- identical decisions -----------------------------------------------------------------------------------

    def steady_until(self, now: float) -> float:
        """As long as everyone runs; `now` if somebody waits."""
        return math.inf if self._everyone_runs() else now

    def repeats(self, times: np.ndarray, free_blocks: np.ndarray) -> int:
        """All of them if everyone runs and nothing moves."""
        return self.decisions_without_moves(times, free_blocks) if self._everyone_runs() else 1

    def update_repeated(self, iteration: Iteration, times: np.ndarray) -> None:
        """Only where they have come to matters."""
        start, end = times[-2:].tolist()
        for request in iteration.requests:
            self.on_progress(request, start, end)

    def _everyone_runs(self) -> bool:
        return self.is_clear and len(self.running) == self.num_requests
