"""How likely tokens were: what a request that asks for `logprobs` or `prompt_logprobs` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

MOST_LOGPROBS = 20
"""Alternatives a request may ask for at each place."""


class TokenLogprobs(NamedTuple):
    """A token under the model's own distribution: before temperature, penalties and whatever else changes the draw."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """1 for the likeliest."""
    top: list[tuple[int, float]]
    """The likeliest tokens and their logarithms, likeliest first; as many as were asked for."""


class Scores(NamedTuple):
    """What one iteration says of one request."""

    prompt: list[TokenLogprobs]
    """Of prompt tokens, in order, those that the iteration computed; the first token of a prompt has none."""
    token: TokenLogprobs | None
    """Of the new token."""


@dataclass(slots=True)
class RequestLogprobs:
    """All that is known of one request until now."""

    prompt: list[TokenLogprobs] = field(default_factory=list)
    """From the prompt's second token on; empty unless asked for."""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    """Of each generated token; empty unless asked for."""

    def add(self, scores: Scores) -> None:
        """Take what an iteration says."""
        self.prompt += scores.prompt
        if scores.token is not None:
            self.tokens.append(scores.token)
