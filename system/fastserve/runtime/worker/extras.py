"""What a row of a batch asks for beyond a draw from the model's logits: changed logits, log probabilities.

Most requests ask for none of it, and have no `RowExtras`: a batch of theirs does what it would do if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastserve.runtime.worker.devices import on_device, tokens_on


class LogitChanges(NamedTuple):
    """What changes a row's logits before its token is drawn, in this order, which is vLLM's."""

    allowed: Sequence[int] | None = None
    """Only these can be drawn; None: all."""
    forbidden: Sequence[int] = ()
    """These cannot be drawn."""
    bias: Sequence[tuple[int, float]] = ()
    """Tokens, each once, and what is added to their logits."""
    repetition_penalty: float = 1.0
    """Of tokens in `counts`: divides positive logits, multiplies negative ones."""
    frequency_penalty: float = 0.0
    """Of tokens in `counts`: subtracted as often as each was generated."""
    presence_penalty: float = 0.0
    """Of tokens in `counts`: subtracted once if it was generated."""
    counts: Mapping[int, int] = {}
    """Tokens of the request and how often each was generated: 0 for those of the prompt alone."""


class PromptTargets(NamedTuple):
    """The prompt tokens to score in an iteration: each under the logits of the token before it."""

    first: int
    """Place, among the tokens that the row computes, of the one before the first target."""
    token_ids: Sequence[int]
    """The targets, consecutive in the prompt."""
    num_top: int
    """Likeliest tokens to tell at each place."""


class RowExtras(NamedTuple):
    """What one row asks for."""

    changes: LogitChanges | None = None
    logprobs: int | None = None
    """Score the new token, and tell so many of the likeliest; None: do not."""
    prompt: PromptTargets | None = None


Extras = Mapping[int, RowExtras]
"""By the row's place in what the worker was given."""


def change_logits(logits: Tensor, changes: Sequence[LogitChanges | None]) -> None:
    """Change `logits`, `[rows, vocab_size]`, in place: each row as its own changes say, whatever the others'."""
    for row, one in zip(logits, changes, strict=True):
        if one is None:
            continue
        if one.allowed is not None:
            allowed = tokens_on(one.allowed, row.device)
            kept = row[allowed]
            row.fill_(-torch.inf).index_copy_(0, allowed, kept)
        if one.forbidden:
            row.index_fill_(0, tokens_on(one.forbidden, row.device), -torch.inf)
        if one.bias:
            biased, added = zip(*one.bias, strict=True)
            row.index_add_(
                0, tokens_on(biased, row.device), on_device(torch.tensor(added, dtype=row.dtype), row.device)
            )
        if one.counts:
            tokens = tokens_on(list(one.counts), row.device)
            times = on_device(torch.tensor(list(one.counts.values()), dtype=row.dtype), row.device)
            seen = row[tokens]
            seen = torch.where(seen > 0, seen / one.repetition_penalty, seen * one.repetition_penalty)
            seen -= one.frequency_penalty * times + one.presence_penalty * (times > 0)
            row.index_copy_(0, tokens, seen)
