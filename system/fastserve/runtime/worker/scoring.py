"""Compute log probabilities of given tokens from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from fastserve.core.logprobs import Scores, TokenLogprobs
from fastserve.runtime.worker.devices import tokens_on
from fastserve.runtime.worker.extras import Extras, RowExtras
from fastserve.runtime.worker.sampler import SharedVocabulary

_MOST_LOGITS = 1 << 24
"""Most logits computed at a time for prompts: 64 MiB in float32."""


class _Scored(NamedTuple):
    """Scores of some rows, on the device."""

    owners: list[tuple[int, bool, int]]
    """For each row: index in the worker's input, whether a prompt token, and how many top tokens to report."""
    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class Scorer:
    """Scores an iteration's tokens. Results stay on the device until `results` is called after the iteration.

    Args:
        extras: what to score.
        shared: how shards compute scores together; None: there is one shard. All shards make the same calls.
    """

    def __init__(self, extras: Extras, shared: SharedVocabulary | None) -> None:
        self._extras = extras
        self._shared = shared
        self._scored: list[_Scored] = []

    def score_new(self, logits: Tensor, tokens: Tensor, order: Sequence[int]) -> None:
        """Score the new tokens of rows that need it.

        Args:
            logits: `[num_requests, vocab_size]`, or this shard's columns.
            tokens: `[num_requests]`.
            order: index of each row in the worker's input.
        """
        asked = [
            (row, place, extras.logprobs)
            for row, place in enumerate(order)
            if (extras := self._extras.get(place)) is not None and extras.logprobs is not None
        ]
        if asked:
            index = tokens_on([row for row, _, _ in asked], logits.device)
            self._score(logits[index], tokens[index], [(place, False, num_top) for _, place, num_top in asked])

    def score_prompts(
        self, states: Tensor, project: Callable[[Tensor], Tensor], order: Sequence[int], vocab_size: int
    ) -> None:
        """Score prompt tokens by the hidden states before them, some at a time to bound memory.

        Args:
            states: `[targets, hidden_size]`, all rows' targets one after the other.
            project: computes the logits of some states.
            order: index of each row in the worker's input.
            vocab_size: columns of the logits.
        """
        tokens: list[int] = []
        owners: list[tuple[int, bool, int]] = []
        for place in order:
            if (prompt := self._extras.get(place, RowExtras()).prompt) is not None:
                tokens += prompt.token_ids
                owners += [(place, True, prompt.num_top)] * len(prompt.token_ids)
        targets = tokens_on(tokens, states.device)
        step = max(1, _MOST_LOGITS // vocab_size)
        for first in range(0, len(tokens), step):
            some = slice(first, first + step)
            self._score(project(states[some]), targets[some], owners[some])

    def results(self) -> dict[int, Scores]:
        """All scores, by index in the worker's input. Waits for the device."""
        prompts: dict[int, list[TokenLogprobs]] = {}
        tokens: dict[int, TokenLogprobs] = {}
        for scored in self._scored:
            columns = (column.tolist() for column in scored[1:])
            for (place, of_prompt, num_top), token, logprob, rank, ids, logprobs in zip(
                scored.owners, *columns, strict=True
            ):
                top = list(zip(ids[:num_top], logprobs[:num_top], strict=True))
                one = TokenLogprobs(token, logprob, rank, top)
                if of_prompt:
                    prompts.setdefault(place, []).append(one)
                else:
                    tokens[place] = one
        return {place: Scores(prompts.get(place, []), tokens.get(place)) for place in prompts.keys() | tokens.keys()}

    def _score(self, logits: Tensor, tokens: Tensor, owners: list[tuple[int, bool, int]]) -> None:
        whole = logits if self._shared is None else self._shared.whole(logits)
        logprobs = whole.float().log_softmax(-1)
        own = logprobs.gather(1, tokens.unsqueeze(1))
        ranks = (logprobs > own).sum(-1) + 1
        top_logprobs, top_ids = logprobs.topk(max(num_top for _, _, num_top in owners), -1)
        self._scored.append(_Scored(owners, tokens, own.squeeze(1), ranks, top_ids, top_logprobs))
