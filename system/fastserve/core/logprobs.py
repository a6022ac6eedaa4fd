"""Log probabilities of tokens, for requests that ask for `logprobs` or `prompt_logprobs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

MOST_LOGPROBS = 20
"""Most alternatives that a request may ask for at each token."""


class TokenLogprobs(NamedTuple):
    """A token under the model's own distribution, before temperature, penalties and other changes of the logits."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]]
    """The most likely tokens with their log probabilities, the most likely first; as many as requested."""


class Scores(NamedTuple):
    """Log probabilities of one request from one iteration."""

    prompt: list[TokenLogprobs]
    """Of the prompt tokens that the iteration computed, in order; the first token of a prompt has none."""
    token: TokenLogprobs | None
    """Of the new token; None if it is not requested or there is none."""


@dataclass(slots=True)
class RequestLogprobs:
    """Log probabilities of one request so far."""

    prompt: list[TokenLogprobs] = field(default_factory=list)
    """From the prompt's second token on; empty unless requested."""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    """Of each generated token; empty unless requested."""

    def add(self, scores: Scores) -> None:
        """Append the results of an iteration."""
        self.prompt += scores.prompt
        if scores.token is not None:
            self.tokens.append(scores.token)
