"""What a real executor's workers are given for an iteration, and how what they return becomes a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastserve.core.logprobs import Scores
from fastserve.core.request import Request, SamplingParams
from fastserve.kvcache import KVCacheManager
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.worker.extras import Extras, LogitChanges, PromptTargets, RowExtras
from fastserve.runtime.worker.runner import Computed
from fastserve.scheduler.iteration import Iteration


class Inputs:
    """Turns iterations into sequences and sampling parameters. Reads block tables from `kv` and changes nothing."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self._params: dict[str, SamplingParams] = {}
        """Of the requests in the system."""
        self._asked: dict[str, _Asked] = {}
        """Of those that ask for more than a draw."""

    def add(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        """A request enters the system."""
        self._params[request.request_id] = params
        asked = _Asked(params, eos_token_ids)
        if asked.anything:
            self._asked[request.request_id] = asked

    def remove(self, request: Request) -> None:
        """It has left."""
        del self._params[request.request_id]
        self._asked.pop(request.request_id, None)

    def sequences(self, iteration: Iteration) -> list[SequenceInput]:
        """What is to be computed, in the iteration's order."""
        sequences = []
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if count:  # Padding takes time and computes nothing; here it does not take time either.
                first = request.num_computed_tokens
                tokens = request.token_ids[first : first + count]
                sequences.append(SequenceInput(tokens, first, self._kv.block_table(request)))
        return sequences

    def sampling(self, iteration: Iteration) -> list[SamplingParams]:
        """How to draw the next token of each sequence."""
        return [
            self._params[request.request_id]
            for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
            if count
        ]

    def extras(self, iteration: Iteration) -> Extras | None:
        """What some sequences ask for beyond that, by place; None: nothing. To be asked once an iteration."""
        if not self._asked:
            return None
        extras: dict[int, RowExtras] = {}
        place = 0
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if count:
                asked = self._asked.get(request.request_id)
                if asked is not None and (row := asked.row(request, count)) is not None:
                    extras[place] = row
                place += 1
        return extras or None


class _Asked:
    """What one request asks for, and what of it there is already."""

    def __init__(self, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self._params = params
        self._ends = tuple(dict.fromkeys((*params.stop_token_ids, *eos_token_ids)))
        self._bias = tuple((params.logit_bias or {}).items())
        self._penalizes_output = bool(params.presence_penalty or params.frequency_penalty)
        self._penalizes = self._penalizes_output or params.repetition_penalty != 1
        self._counts: dict[int, int] = {}
        self._num_counted = 0
        """Tokens of the request that `_counts` knows."""
        self._num_scored = 1
        """Prompt tokens that were scored or are being: a cache that was dropped is computed again, and they are not."""

    @property
    def anything(self) -> bool:
        """Whether there is anything."""
        params = self._params
        changes = params.min_tokens or params.allowed_token_ids is not None or self._bias or self._penalizes
        return bool(changes) or params.asks_logprobs

    def row(self, request: Request, count: int) -> RowExtras | None:
        """For an iteration that computes `count` more of its tokens."""
        end = request.num_computed_tokens + count
        changes = logprobs = None
        if end == request.num_tokens:  # There will be a new token.
            changes, logprobs = self._changes(request), self._params.logprobs
        prompt = self._targets(request, end)
        if changes is None and logprobs is None and prompt is None:
            return None
        return RowExtras(changes, logprobs, prompt)

    def _changes(self, request: Request) -> LogitChanges | None:
        params = self._params
        forbidden = self._ends if request.num_output_tokens < params.min_tokens else ()
        if self._penalizes:
            self._count(request)
        if not (forbidden or self._bias or self._penalizes or params.allowed_token_ids is not None):
            return None
        return LogitChanges(
            params.allowed_token_ids,
            forbidden,
            self._bias,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            self._counts,
        )

    def _count(self, request: Request) -> None:
        """Take in the tokens that have come since the last time."""
        counts = self._counts
        if not self._num_counted:
            self._num_counted = request.num_prompt_tokens
            if self._params.repetition_penalty != 1:
                counts.update(dict.fromkeys(request.token_ids[: self._num_counted], 0))
        for token in request.token_ids[self._num_counted :]:
            counts[token] = counts.get(token, 0) + 1
        self._num_counted = len(request.token_ids)

    def _targets(self, request: Request, end: int) -> PromptTargets | None:
        """The prompt tokens that come to be scored when all before `end` are computed."""
        first, beyond = self._num_scored, min(end + 1, request.num_prompt_tokens)
        if self._params.prompt_logprobs is None or first >= beyond:
            return None
        self._num_scored = beyond
        # A token is scored by the one before it.
        before = first - 1 - request.num_computed_tokens
        return PromptTargets(before, request.token_ids[first:beyond], self._params.prompt_logprobs)


def by_request(
    computed: Computed, num_scheduled_tokens: Sequence[int]
) -> tuple[Sequence[int], Mapping[int, Scores] | None]:
    """A token for every request of an iteration, of those of its sequences, 0 where nothing was computed; and scores by
    the request's place."""
    if len(computed.tokens) == len(num_scheduled_tokens):
        return computed.tokens, computed.scores
    tokens = iter(computed.tokens)
    scores = computed.scores
    if scores is not None:
        places = [place for place, count in enumerate(num_scheduled_tokens) if count]
        scores = {places[place]: one for place, one in scores.items()}
    return [next(tokens) if count else 0 for count in num_scheduled_tokens], scores
