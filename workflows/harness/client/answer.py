"""A streamed answer as the client sees it: its events, their times, their tokens, and the metrics that follow.

An event is not a token: servers send events without a token (a role, a keep-alive, the usage) and events with several.
The number of tokens in an event is what the server says with it, by a running `usage` or by `token_ids`. If the server
does not say, an event with text counts as one token and an event without text as none. The answer's `usage` then shows
whether the count is right; if it is not, the metrics that depend on it are NaN.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastserve.core.request import RequestStatus
from harness.client.server import message_of
from harness.client.sse import Event

TOLERANCE = 0.05
"""Largest relative effect on the time per token of tokens whose event is unknown."""
FASTEST_EVENT_S = 1e-4
"""If events follow each other faster, on average over an answer, they were held back and sent together: no model
generates so fast. They arrive in a few reads of some hundred events, and a client takes 10 to 50 µs for each event."""
_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")
"""Fields of a chat's delta that hold generated text."""
_BROKEN_OFF = ("abort", "error")
"""Values of finish_reason that mean an error."""


class BrokenAnswer(Exception):
    """An answer that cannot be completed; the message is the reason."""


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and its answer as the client sees them: a row of requests.parquet, in seconds from the run's start.

    Call `take` for each event, then `end`, which decides the outcome once.
    """

    request_id: str
    arrival_s: float
    """The time at which the request is to be sent."""
    prompt_tokens: int
    """Tokens of the prompt: the server's count, if it gives one."""
    max_tokens: int
    due_s: float = math.nan
    """The arrival, or the later time at which the cap on concurrency released the request."""
    sent_s: float = math.nan
    """The time at which the request's headers were written to a connection."""
    token_s: array[float] = field(default_factory=lambda: array("d"))
    """The time of each event with a token."""
    tokens_per_event: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of each of these events; 1 if the server does not say."""
    shown_tokens: int = 0
    """The sum of `tokens_per_event`."""
    counts_are_said: bool = True
    """Whether the server has said how many tokens each event holds."""
    outcome: RequestStatus = RequestStatus.ACTIVE
    error: str = ""
    usage_tokens: int = 0
    """The server's count of output tokens so far, if it gives one; at the end, of all."""
    finish_reason: str = ""
    _last_event_s: float = math.nan
    """The time of the last event with a choice."""
    _last_was_empty: bool = False

    # Columns that a client cannot measure.
    first_scheduled_s = queueing_s = swapping_s = execution_s = None
    preemptions = swap_out_bytes = swap_in_bytes = recomputed_tokens = cached_tokens = None

    # -- metrics -----------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """The status of the request."""
        return self.outcome.value

    @property
    def output_tokens(self) -> int:
        """The server's count of output tokens; without it, the limit if it was reached, else the events' tokens."""
        if self.usage_tokens:
            return self.usage_tokens
        if self.finish_reason == "length" and not self.counts_are_said:
            return self.max_tokens
        return self.shown_tokens

    @property
    def event_tokens(self) -> array[int] | None:
        """Tokens in each event of `token_s`; None if the server does not say."""
        return self.tokens_per_event if self.counts_are_said else None

    @property
    def first_token_s(self) -> float:
        """The time of the first token; NaN without one, or if all text of a finished answer came together."""
        finished = self.outcome is RequestStatus.FINISHED
        return math.nan if not self.token_s or (finished and not self.is_streamed) else self.token_s[0]

    @property
    def finished_s(self) -> float:
        """The time of the last token; NaN unless the request finished.

        This is the last event with a token. If some tokens belong to no event, it is the last event of the answer.
        """
        if self.outcome is not RequestStatus.FINISHED:
            return math.nan
        all_show = self.shown_tokens >= self.output_tokens or self.adds_up
        return self.token_s[-1] if self.token_s and all_show else self._last_event_s

    @property
    def tpot_s(self) -> float:
        """Mean time between output tokens; NaN for fewer than two tokens, and if it is unknown.

        The tokens of the first event were generated before it, so the time after it belongs to the other tokens.
        """
        if self.output_tokens < 2 or not self.tells_time_per_token:
            return math.nan
        return (self.finished_s - self.first_token_s) / (self.output_tokens - self.tokens_per_event[0])

    @property
    def max_token_gap_s(self) -> float:
        """Longest time between two consecutive events with a token; NaN if it is unknown."""
        if self.output_tokens < 2:
            return 0.0
        return float(np.diff(self.token_s).max()) if self.tells_time_per_token else math.nan

    @property
    def is_streamed(self) -> bool:
        """Whether the first text came before the last. True for a single token."""
        if self.output_tokens < 2 and (self.counts_are_said or self.usage_tokens or self.max_tokens < 2):
            return True
        return len(self.token_s) > 1 and self.token_s[-1] - self.token_s[0] >= FASTEST_EVENT_S * len(self.token_s)

    @property
    def adds_up(self) -> bool:
        """Whether tokens and events differ so little that the event of the other tokens does not matter."""
        shown, tokens = self.shown_tokens, self.output_tokens
        return abs(shown - tokens) <= TOLERANCE * (min(shown, tokens) - 1)

    @property
    def tells_time_per_token(self) -> bool:
        """Whether the answer is finished and shows the times of its tokens."""
        return self.outcome is RequestStatus.FINISHED and self.is_streamed and self.adds_up

    # -- events ------------------------------------------------------------------------------------------------------

    def take(self, event: Event, now_s: float) -> bool:
        """Record an event of the answer; return whether it is the last.

        Empty events are skipped. Raises BrokenAnswer if the event reports an error, or if it may hold tokens and cannot
        be read.
        """
        if event.data.strip() == b"[DONE]":
            return True
        try:
            content = json.loads(event.data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("error") or content.get("object") == "error":
            raise BrokenAnswer(message_of(event.data))
        choices = content.get("choices")
        if event.kind == b"error" or (choices and not isinstance(choices, list)):
            raise BrokenAnswer(message_of(event.data))
        usage = content.get("usage")
        said = self._note_usage(usage) if isinstance(usage, dict) else None
        if choices:
            self._note_choices(choices, said, now_s)
        return False

    def end(self, outcome: RequestStatus, error: str) -> None:
        """End the request with this outcome; a finish_reason received before means that the answer is complete."""
        if self.outcome is not RequestStatus.ACTIVE:
            return
        if self.finish_reason or outcome is RequestStatus.FINISHED:
            outcome, error = RequestStatus.FINISHED, ""
            self._add_ending_token()
            if self.finish_reason in _BROKEN_OFF:
                outcome, error = (
                    RequestStatus.FAILED,
                    f"the server ended it early: finish_reason {self.finish_reason!r}",
                )
            elif not self.output_tokens:
                outcome, error = RequestStatus.FAILED, "the stream held no token"
        self.outcome, self.error = outcome, error

    def fail(self, error: str) -> None:
        """End the request as failed, also after a finish_reason."""
        if self.outcome is RequestStatus.ACTIVE:
            self.outcome, self.error = RequestStatus.FAILED, error

    def _note_usage(self, usage: Mapping[str, Any]) -> int | None:
        """Record a usage; return its output tokens so far, if it has them."""
        self.prompt_tokens = _count(usage.get("prompt_tokens")) or self.prompt_tokens
        said = _count(usage.get("completion_tokens"))
        if said is not None:
            self.usage_tokens = max(said, self.usage_tokens)
        return said

    def _note_choices(self, choices: Sequence[Any], said: int | None, now_s: float) -> None:
        has_text, num_ids = False, None
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            if choice.get("text") or _has_text(choice.get("delta")):
                has_text = True
            if isinstance(ids := choice.get("token_ids"), list):
                num_ids = (num_ids or 0) + len(ids)
            if reason := choice.get("finish_reason"):
                self.finish_reason = str(reason)
        self._last_event_s, self._last_was_empty = now_s, not has_text
        if has_text and said is not None and said <= self.shown_tokens and not self.finish_reason:
            said = None  # New text has tokens, so this usage is no running count. Held-back text may end an answer.
        if said is None and num_ids is None and has_text and self.counts_are_said:
            # Earlier counts are then unreliable too.
            self.counts_are_said = False
            self.shown_tokens = len(self.token_s)
            self.tokens_per_event = array("q", [1]) * self.shown_tokens
        if not self.counts_are_said:
            num_tokens = int(has_text)  # The usage at the end covers all events.
        elif said is not None:
            num_tokens = max(said - self.shown_tokens, 0)
        else:
            num_tokens = num_ids or 0
        if num_tokens:
            self._add(num_tokens, now_s)

    def _add_ending_token(self) -> None:
        """Add the token that ends an output, which has no text.

        If the usage has one token more than the events with text, that token belongs to the last event.
        """
        if (
            not self.counts_are_said
            and self.finish_reason == "stop"
            and self._last_was_empty
            and self.usage_tokens == self.shown_tokens + 1
        ):
            self._add(1, self._last_event_s)

    def _add(self, num_tokens: int, now_s: float) -> None:
        self.token_s.append(now_s)
        self.tokens_per_event.append(num_tokens)
        self.shown_tokens += num_tokens


def _has_text(delta: Any) -> bool:
    """Whether a chat's delta holds generated text."""
    return isinstance(delta, dict) and any(delta.get(name) for name in _TEXTS)


def _count(value: Any) -> int | None:
    """The value if it is a number of tokens; else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
