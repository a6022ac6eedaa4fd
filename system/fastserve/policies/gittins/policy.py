"""Gittins index scheduling on lengths learned from what has finished: a policy of our own (docs/own-policy.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastserve.core.checks import require_int, require_positive
from fastserve.core.config import SchedulerConfig
from fastserve.core.errors import ConfigError
from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache import KVCacheManager, Transfer
from fastserve.latency import LatencyModel
from fastserve.policies.gittins.index import gittins_index
from fastserve.policies.gittins.lengths import LengthHistory, Stages, kind_of_prompt, prompt_of_kind
from fastserve.policies.gittins.queue import FIRST_OF_ALL, IndexQueue
from fastserve.scheduler import Policy, PreemptiveOptions, register

STAGES = Stages()
_EXPONENTS = {"slowdown": 3.0, "jct": 1.0}
_REFRESHES_PER_MEMORY = 32
"""How often the index of a kind is computed anew while as many finish as are remembered, or were known before."""
_NEWEST_TRANSFER = 0.05
"""Share of the newest transfer in the running mean of what moving a token takes."""


@dataclass(frozen=True)
class GittinsOptions(PreemptiveOptions):
    """What to minimize, and how the past counts."""

    objective: Literal["slowdown", "jct"] = "slowdown"
    """Cost of a request: its completion time over its output length (slowdown), or its completion time (jct)."""
    exponent: float | None = None
    """p in mean(cost ** p). 1 is the plain mean; a larger p favours requests that wait longest. None takes 3 for
    slowdown and 1 for jct."""
    alpha_s: float | None = 0.3
    """Requests that have waited this many seconds come first, as long as all of them fit one batch; none: never."""
    memory_requests: float = 1000.0
    """Finished requests after which an old one counts 1/e: enough to know a distribution and to follow its changes."""
    switching_cost: float = 1.0
    """Share of the measured time of a swap that counts against a swapped-out request; 0 makes swapping free."""
    max_passed_over: int = 16
    """Prompts beyond the token budget that a decision passes over before it tries no more of them; bounds its cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """How far a request has come."""

    kind: int
    """That of its prompt."""
    stage: int = 0
    stage_ends: int = STAGES.ends[0]
    """Output tokens with which the next stage begins."""


@register
class Gittins(Policy):
    """Serves first the request that promises the most relief for the machine time it takes, as far as is known.

    A request's Gittins index is the largest ratio, over how long it may be served, of the cost that its finishing is
    expected to end to the time until it finishes or is given up. What is expected rests on its prompt length and on
    the tokens it has produced: `LengthHistory` learns from every request how likely the next ones are to finish. A
    prompt not computed yet, and a cache that is swapped out, cost time before the next token.

    The cost of a request is a power of its slowdown (or completion time) and grows while it waits, as in the
    generalized c-mu rule. Levels are the stages of a request's progress; level 0 is for requests that waited `alpha_s`.
    """

    name = "gittins"
    Options = GittinsOptions
    needs_latency = True
    learns = True
    options: GittinsOptions
    queue: IndexQueue

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: GittinsOptions
    ) -> None:
        super().__init__(config, kv, latency, options, longest_wait_s=options.alpha_s)
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
        self._starved: dict[str, Request] = {}
        """Requests that have waited `alpha_s` and do not run."""
        self._are_first = False
        """Whether the starved requests come before all others."""

    @property
    def exponent(self) -> float:
        """The power of the slowdown or completion time that a request costs."""
        return self.options.exponent or _EXPONENTS[self.options.objective]

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

    def on_transfer(self, transfer: Transfer, duration_s: float) -> None:
        """Measure the cost of swapping."""
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
        # While a cache moves out and in, its place in the batch stands empty at worst.
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
        """Join."""
        kind = self._kind(request.num_prompt_tokens)
        self._refresh_if_stale(kind)
        request.policy_state = _PolicyState(kind)
        self.queue.join(request, 1)

    def on_start(self, request: Request, now: float) -> None:
        """It starves no longer."""
        self._starved.pop(request.request_id, None)

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Move on when a stage of its life is over."""
        state: _PolicyState = request.policy_state
        num_output_tokens = request.num_output_tokens
        if num_output_tokens < state.stage_ends and request.level:
            return
        while num_output_tokens >= state.stage_ends and state.stage < len(STAGES) - 1:
            self.history.passed(state.kind, state.stage)
            state.stage += 1
            state.stage_ends = STAGES.ends[state.stage]
        self.queue.move(request, 1 + state.stage)

    def on_remove(self, request: Request) -> None:
        """Learn from a finished request. An aborted request counts as far as it came."""
        self._starved.pop(request.request_id, None)
        if request.status is RequestStatus.FINISHED:
            state: _PolicyState = request.policy_state
            self.history.finished(state.kind, state.stage)
            self._refresh_if_stale(state.kind)

    # -- starvation --------------------------------------------------------------------------------------------

    def on_starved(self, request: Request, now: float) -> None:
        """Count it among the starved until it runs."""
        self._starved[request.request_id] = request

    def prepare(self, now: float) -> None:
        """Set the time of the indices, and put starved requests first if they fit one batch."""
        self.queue.now = now
        if self._starved or self._are_first:
            self._put_starved_first(self._fit_one_batch(self._starved))

    def _fit_one_batch(self, requests: dict[str, Request]) -> bool:
        """Whether these have room in one batch, and their caches in memory."""
        if len(requests) > self.config.max_batch_size:
            return False
        kv = self.kv
        room = kv.config.num_gpu_blocks - self.options.most_reserved(kv.config.num_gpu_blocks)
        return sum([kv.blocks_for(request.num_tokens) for request in requests.values()]) <= room

    def _put_starved_first(self, first: bool) -> None:
        """More starved requests than fit one batch cannot all come first: then the index decides again."""
        if not first and not self._are_first:
            return
        self._are_first = first
        for request in self._starved.values():
            level = FIRST_OF_ALL if first else 1 + request.policy_state.stage
            if request.level != level:
                self.queue.move(request, level)

    # -- identical decisions -----------------------------------------------------------------------------------

    def steady_until(self, now: float, is_clear: bool) -> float:
        """Without limit if all requests run; `now` if one waits."""
        return math.inf if self._all_run(is_clear) else now

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """All of them if all requests run."""
        return len(times) - 1 if self._all_run(is_clear) else 1

    def on_repeated(self, requests: Sequence[Request], times: np.ndarray) -> None:
        """Only the progress at the end matters."""
        start, end = times[-2:].tolist()
        for request in requests:
            self.on_progress(request, start, end)

    def _all_run(self, is_clear: bool) -> bool:
        return is_clear and len(self.running) == len(self.queue)
