"""Turn an iteration into the inputs of a worker, and the worker's output into a result."""

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
        """Parameters of the requests in the system."""
        self._extras: dict[str, _RequestExtras] = {}
        """Requests that need more than a sampled token."""

    def add(self, request: Request, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        """Take a request that enters the system."""
        self._params[request.request_id] = params
        extras = _RequestExtras(params, eos_token_ids)
        if extras.needed:
            self._extras[request.request_id] = extras

    def remove(self, request: Request) -> None:
        """Forget a request that has left."""
        del self._params[request.request_id]
        self._extras.pop(request.request_id, None)

    def sequences(self, iteration: Iteration) -> list[SequenceInput]:
        """The tokens to compute, in the iteration's order; without rows of padding."""
        sequences = []
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if count:  # Padding computes nothing, and takes no time here.
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
        """What sequences need beyond a sampled token, by index; None: nothing. Call it once an iteration."""
        if not self._extras:
            return None
        extras: dict[int, RowExtras] = {}
        index = 0
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if count:
                needed = self._extras.get(request.request_id)
                if needed is not None and (row := needed.row(request, count)) is not None:
                    extras[index] = row
                index += 1
        return extras or None


class _RequestExtras:
    """What one request needs beyond sampled tokens, and how far that is done."""

    def __init__(self, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self._params = params
        self._ends = tuple(dict.fromkeys((*params.stop_token_ids, *eos_token_ids)))
        self._bias = tuple((params.logit_bias or {}).items())
        self._penalizes_output = bool(params.presence_penalty or params.frequency_penalty)
        self._penalizes = self._penalizes_output or params.repetition_penalty != 1
        self._counts: dict[int, int] = {}
        self._num_counted = 0
        """Tokens of the request that `_counts` includes."""
        self._num_scored = 1
        """Prompt tokens scored so far: recomputing a dropped cache does not score them again."""

    @property
    def needed(self) -> bool:
        """Whether the request needs anything beyond sampled tokens."""
        params = self._params
        changes = params.min_tokens or params.allowed_token_ids is not None or self._bias or self._penalizes
        return bool(changes) or params.asks_logprobs

    def row(self, request: Request, count: int) -> RowExtras | None:
        """The extras for an iteration that computes `count` more tokens; None: none."""
        end = request.num_computed_tokens + count
        changes = logprobs = None
        if end == request.num_tokens:  # It generates a token.
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
        """Count the tokens since the last call."""
        counts = self._counts
        if not self._num_counted:
            self._num_counted = request.num_prompt_tokens
            if self._params.repetition_penalty != 1:
                counts.update(dict.fromkeys(request.token_ids[: self._num_counted], 0))
        for token in request.token_ids[self._num_counted :]:
            counts[token] = counts.get(token, 0) + 1
        self._num_counted = len(request.token_ids)

    def _targets(self, request: Request, end: int) -> PromptTargets | None:
        """The prompt tokens to score in an iteration that computes all tokens before `end`; None: none."""
        first, beyond = self._num_scored, min(end + 1, request.num_prompt_tokens)
        if self._params.prompt_logprobs is None or first >= beyond:
            return None
        self._num_scored = beyond
        # The logits of the token before score a token.
        before = first - 1 - request.num_computed_tokens
        return PromptTargets(before, request.token_ids[first:beyond], self._params.prompt_logprobs)


def by_request(
    computed: Computed, num_scheduled_tokens: Sequence[int]
) -> tuple[Sequence[int], Mapping[int, Scores] | None]:
    """Map a worker's output, by sequence, to the requests of the iteration: tokens (0 for padding), and scores."""
    if len(computed.tokens) == len(num_scheduled_tokens):
        return computed.tokens, computed.scores
    tokens = iter(computed.tokens)
    scores = computed.scores
    if scores is not None:
        places = [place for place, count in enumerate(num_scheduled_tokens) if count]
        scores = {places[index]: scored for index, scored in scores.items()}
    return [next(tokens) if count else 0 for count in num_scheduled_tokens], scores
