"""RowExtras: what a row of a batch needs beyond a sampled token: changed logits, log probabilities.

Most requests need none, and a batch without RowExtras costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastserve.runtime.worker.devices import on_device, tokens_on


class LogitChanges(NamedTuple):
    """Changes of a row's logits before its token is drawn, applied in this order, which is vLLM's."""

    allowed: Sequence[int] | None = None
    """The only tokens that can be drawn; None: all."""
    forbidden: Sequence[int] = ()
    """Tokens that cannot be drawn."""
    bias: Sequence[tuple[int, float]] = ()
    """Tokens, each once, with the number added to their logits."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in `counts`, and multiplies negative ones."""
    frequency_penalty: float = 0.0
    """Subtracted from logits of tokens in `counts`, once for each time the token was generated."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens in `counts` that were generated."""
    counts: Mapping[int, int] = {}
    """Tokens of the request and how often each was generated; 0 if a token is only in the prompt."""


class PromptTargets(NamedTuple):
    """The prompt tokens to score in an iteration, each by the logits of the token before it."""

    first: int
    """Index, among the tokens that the row computes, of the token before the first target."""
    token_ids: Sequence[int]
    """The targets, consecutive in the prompt."""
    num_top: int
    """Most likely tokens to report at each target."""


class RowExtras(NamedTuple):
    """What one row needs."""

    changes: LogitChanges | None = None
    logprobs: int | None = None
    """Score the new token and report this many most likely tokens; None: do not."""
    prompt: PromptTargets | None = None


Extras = Mapping[int, RowExtras]
"""By the index of the sequence in the worker's input."""


def change_logits(logits: Tensor, changes: Sequence[LogitChanges | None]) -> None:
    """Change `logits`, `[rows, vocab_size]`, in place, each row by its own changes."""
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
