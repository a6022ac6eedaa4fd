"""Gittins index scheduling on lengths learned from what has finished: a policy of our own (docs/own-policy.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastserve.core.compiled import mypyc_attr
from fastserve.core.config import SchedulerConfig
from fastserve.core.request import NO_CACHE, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache import KVCacheManager, Transfer
from fastserve.latency import LatencyModel
from fastserve.policies.gittins.index import GittinsIndex
from fastserve.policies.gittins.lengths import LengthHistory, Stages, kind_of_prompt, prompt_of_kind
from fastserve.policies.gittins.options import GittinsOptions as GittinsOptions
from fastserve.policies.gittins.queue import FIRST_OF_ALL, IndexQueue
from fastserve.scheduler import Policy, register

STAGES = Stages()
_EXPONENTS = {"slowdown": 3.0, "jct": 1.0}
_REFRESHES_PER_MEMORY = 32
"""How often the index of a kind is computed anew while as many finish as are remembered, or were known before."""
_FEWEST = 3
"""Decisions alike that are worth a jump."""
_NEWEST_TRANSFER = 0.05
"""Share of the newest transfer in the running mean of what moving a token takes."""


class _Costs(NamedTuple):
    """Machine time (s) for requests of a kind, by stage."""

    contexts: np.ndarray
    """Tokens in the cache."""
    shares: np.ndarray
    """Of the machine that a request takes, while it runs and while its cache moves."""
    of_token: np.ndarray
    """Of a token: its share of a full batch's iteration."""
    of_setup: np.ndarray
    """Before the first token, by cache state: of computing the prompt and what was produced, beside a batch of their
    like, or of moving the cache."""


@dataclass(slots=True)
class _PolicyState:
    """How far a request has come."""

    kind: int
    """That of its prompt."""
    stage: int = 0
    stage_ends: int = STAGES.ends[0]
    """Output tokens with which the next stage begins."""


def _tokens_to_next_stage(request: Request) -> int:
    """How many tokens a request has to generate until its stage is over."""
    state: _PolicyState = request.policy_state
    return state.stage_ends - request.num_output_tokens


@mypyc_attr(allow_interpreted_subclasses=True)
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

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: GittinsOptions
    ) -> None:
        self._options = options  # `make_queue` reads them.
        super().__init__(config, kv, latency, options, longest_wait_s=options.alpha_s)
        queue = self.queue
        assert isinstance(queue, IndexQueue)
        self._queue = queue
        self.max_passed_over = options.max_passed_over
        self.history = LengthHistory(STAGES, options.memory_requests)
        self._refreshed_at: list[int] = []
        """For each kind, how many requests had finished when its index was last computed."""
        self._known_before: dict[int, tuple[np.ndarray, float]] = {}
        """For a kind without requests, hazards and transfer time from which to compute its index when one comes."""
        self._costs: dict[int, _Costs] = {}
        self._step_s = self.latency.iteration_time((), (1,) * self.config.max_batch_size)
        length_power = self.exponent if options.objective == "slowdown" else 0.0
        self._index = GittinsIndex(STAGES, length_power, self._step_s)
        self._token_transfer_s = 0.0
        """Measured: seconds the link needs to move the cache of a token, one way."""
        self._starved: dict[str, Request] = {}
        """Requests that have waited `alpha_s` and do not run."""
        self._are_first = False
        """Whether the starved requests come before all others."""

    @property
    def exponent(self) -> float:
        """The power of the slowdown or completion time that a request costs."""
        return self._options.exponent or _EXPONENTS[self._options.objective]

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
            self._queue.add_kind()
            self._refreshed_at.append(-1)
        if self._refreshed_at[kind] < 0:
            self._refresh(kind)
        return kind

    def _price(self, num_prompt_tokens: int) -> _Costs:
        time, places = self.latency.iteration_time, self.config.max_batch_size
        contexts = [num_prompt_tokens + start for start in STAGES.starts]
        shares = np.array([self._share(context) for context in contexts])
        of_token = np.array([time((), (context,) * places) for context in contexts]) * shares
        others = (num_prompt_tokens,) * (places - 1)
        without = time((), (*others, num_prompt_tokens))
        of_setup = np.zeros((len(STAGES), 3))
        of_setup[:, NO_CACHE] = [max(0.0, time((context,), others) - without) for context in contexts]
        return _Costs(np.array(contexts), shares, of_token, of_setup)

    def _share(self, context: int) -> float:
        """Share of the machine that a request with a context of so many tokens takes: of the places, or of the cache.

        While the batch is full and the cache is not, a place is what others wait for; where contexts are so long that
        fewer requests than `max_batch_size` fit the cache, it is memory. In both a price of the other would be wrong.
        """
        of_places = 1 / self.config.max_batch_size
        if not self._options.prices_memory:
            return of_places
        kv = self.kv
        usable = kv.config.num_gpu_blocks - self._options.most_reserved(kv.config.num_gpu_blocks)
        return max(of_places, context / (usable * kv.block_size))

    def _is_stale(self, kind: int) -> bool:
        seen, memory = self._refreshed_at[kind], self._options.memory_requests
        return self.history.num_finished - seen > min(seen, memory) / _REFRESHES_PER_MEMORY

    def _refresh(self, kind: int) -> None:
        """Compute the index of a kind from what is known by now."""
        self._refreshed_at[kind] = self.history.num_finished
        self._known_before.pop(kind, None)
        self._weigh(kind, self.history.hazards(kind), self._token_transfer_s)

    def _weigh(self, kind: int, hazards: np.ndarray, token_transfer_s: float) -> None:
        if kind not in self._costs:
            self._costs[kind] = self._price(prompt_of_kind(kind))
        costs = self._costs[kind]
        # While a cache moves out and in, its share of the machine is idle at worst.
        moving_s = 2 * token_transfer_s * costs.contexts
        costs.of_setup[:, SWAPPED_OUT] = self._options.switching_cost * moving_s * costs.shares
        self._queue.set_index(kind, self._index.compute(hazards, costs.of_token, costs.of_setup))

    # -- the life of a request ---------------------------------------------------------------------------------

    def on_add(self, request: Request) -> None:
        """Join."""
        kind = self._kind(request.num_prompt_tokens)
        if self._is_stale(kind):
            self._refresh(kind)
        elif kind in self._known_before:
            self._weigh(kind, *self._known_before.pop(kind))
        request.policy_state = _PolicyState(kind)
        self._queue.join(request, 1)

    def on_start(self, request: Request, now: float) -> None:
        """It starves no longer."""
        self._starved.pop(request.request_id, None)

    def on_progress(self, request: Request, start: float, end: float) -> None:
        """Move on when a stage of its life is over."""
        state: _PolicyState = request.policy_state
        num_output_tokens = request.num_tokens - request.num_prompt_tokens
        if num_output_tokens < state.stage_ends and request.level:
            return
        while num_output_tokens >= state.stage_ends and state.stage < len(STAGES) - 1:
            self.history.passed(state.kind, state.stage)
            state.stage += 1
            state.stage_ends = STAGES.ends[state.stage]
        self._queue.move(request, 1 + state.stage)

    def on_remove(self, request: Request) -> None:
        """Learn from a finished request. An aborted request counts as far as it came."""
        self._starved.pop(request.request_id, None)
        if request.status is RequestStatus.FINISHED:
            state: _PolicyState = request.policy_state
            kind = state.kind
            self.history.finished(kind, state.stage)
            if self._is_stale(kind):
                if self._queue.num_of_kind(kind):
                    self._refresh(kind)
                else:
                    self._refreshed_at[kind] = self.history.num_finished
                    self._known_before[kind] = self.history.hazards(kind), self._token_transfer_s

    # -- starvation --------------------------------------------------------------------------------------------

    def on_starved(self, request: Request, now: float) -> None:
        """Count it among the starved until it runs."""
        self._starved[request.request_id] = request

    def prepare(self, now: float) -> None:
        """Set the time of the indices, and put starved requests first if they fit one batch."""
        self._queue.now = now
        if self._starved:
            self._put_starved_first(self._fit_one_batch(self._starved))

    def _fit_one_batch(self, requests: dict[str, Request]) -> bool:
        """Whether these have room in one batch, and their caches in memory."""
        if len(requests) > self.config.max_batch_size:
            return False
        kv = self.kv
        room = kv.config.num_gpu_blocks - self._options.most_reserved(kv.config.num_gpu_blocks)
        return sum([kv.blocks_for(request.num_tokens) for request in requests.values()]) <= room

    def _put_starved_first(self, first: bool) -> None:
        """More starved requests than fit one batch cannot all come first: then the index decides again."""
        if not first and not self._are_first:
            return
        self._are_first = first
        for request in self._starved.values():
            level = FIRST_OF_ALL if first else 1 + request.policy_state.stage
            if request.level != level:
                self._queue.move(request, level)

    # -- identical decisions -----------------------------------------------------------------------------------

    def steady_until(self, now: float, is_clear: bool) -> float:
        """Without limit if all requests run; else until a wait is too long, or `now` if the batch changes soon."""
        if not is_clear:
            return now
        running = self.running
        if len(running) == len(self._queue):
            return math.inf
        until = self._index_decides_until()
        if until <= now + (_FEWEST - 1) * self._step_s or len(running) != self.config.max_batch_size:
            return now
        requests = list(running.values())
        left = [_tokens_to_next_stage(request) for request in requests]
        if min(left) < _FEWEST and self._stages_move_caches(_FEWEST):
            return now
        step_s = self.latency.iteration_time((), [request.num_tokens for request in requests])
        times = [now + k * step_s for k in range(_FEWEST)]
        return until if self._num_ahead(requests, left, times) == _FEWEST else now

    def repeats(self, times: np.ndarray, is_clear: bool) -> int:
        """All of them if all requests run; else as long as those that run come first and no wait is too long."""
        if not is_clear:
            return 1
        count = len(times) - 1
        running = self.running
        if len(running) == len(self._queue):
            return count
        requests = list(running.values())
        if len(running) != self.config.max_batch_size or min([r.level for r in requests]) == FIRST_OF_ALL:
            return 1
        # Iteration k is decided at times[k], and requests whose wait has ended by then count as starved first.
        count = min(count, int(np.searchsorted(times[:count], self._index_decides_until(), side="left")))
        left = [_tokens_to_next_stage(request) for request in requests]
        if self._stages_move_caches(count):
            count = min(count, *left)
        return max(1, self._num_ahead(requests, left, times[:count].tolist()))

    def _num_ahead(self, requests: list[Request], left: list[int], times: list[float]) -> int:
        """At how many of these times (s) in a row the requests come before all others.

        Each produces a token from one time to the next, and enters its next stage after `left` tokens.
        """
        outlook = self._queue.outlook(requests)
        stages = [request.policy_state.stage for request in requests]
        count, first = len(times), 0
        while first < count:
            end = min(count, *left)
            if end <= first or not outlook.holds_at(times[first]):
                return first
            if not outlook.holds_at(times[end - 1]):
                known, end = first, end - 1
                while end - known > 1:
                    middle = (known + end) // 2
                    if outlook.holds_at(times[middle]):
                        known = middle
                    else:
                        end = middle
                return end
            first = end
            for index, request in enumerate(requests):
                if left[index] == end:
                    stages[index] += 1
                    if stages[index] == len(STAGES):
                        return end
                    outlook.enter_next_level(index)
                    left[index] = STAGES.ends[stages[index]] - request.num_output_tokens
        return count

    def on_repeated(self, requests: Sequence[Request], times: np.ndarray) -> None:
        """Only the progress at the end matters."""
        start, end = times[-2:].tolist()
        for request in requests:
            self.on_progress(request, start, end)

    def _index_decides_until(self) -> float:
        """Until when (s) starved requests do not come first, if no request starts until then."""
        if not self._starved:
            return self.waiting.first_end_s
        # If more starve, they fit one batch still less.
        return -math.inf if self._fit_one_batch(self._starved) else math.inf

    def _stages_move_caches(self, count: int) -> bool:
        """Whether caches may move, in `count` iterations of the same batch, because requests enter their next stage."""
        if self._options.swap != "proactive":
            return False
        kv = self.kv
        growth = len(self.running) * (1 + count // kv.block_size)
        most_reserved = self._options.most_reserved(kv.config.num_gpu_blocks)
        return self._queue.num_swapped_out > 0 or kv.num_free_gpu_blocks < growth + most_reserved


register(Gittins)
