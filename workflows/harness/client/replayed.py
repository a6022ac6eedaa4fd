"""The result of a replay: what was measured, how, and what makes the measurement other than intended."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.core.request import RequestStatus
from harness.client.answer import TOLERANCE, Exchange
from harness.client.server import Server
from harness.workload.traces.lengths import FloatArray


@dataclass(frozen=True)
class Replay:
    """The result of replaying a workload."""

    server: Server
    exchanges: Sequence[Exchange]
    """Every request and its answer, in order of arrival."""
    counted: dict[str, int | None]
    """Counts of the server during the replay, by keys of summary.json."""
    wanted_connections: int
    max_connections: int
    """Maximum concurrent connections: those wanted, or what the limit on open files allows."""
    run_id: str
    """The X-Request-ID of a request is this, a hyphen and the request's id."""
    ignore_eos: bool
    """Whether the server was asked for exactly as many tokens as the trace has."""
    stopped_by: signal.Signals | None
    """The signal that ended the replay early, if any; unfinished requests are then aborted."""

    @property
    def lateness_s(self) -> FloatArray:
        """Seconds between due time and sending of each request that was sent."""
        late = np.array([each.sent_s - each.due_s for each in self.exchanges])
        return late[np.isfinite(late)]

    @property
    def finished(self) -> list[Exchange]:
        """The requests that finished."""
        return [each for each in self.exchanges if each.outcome is RequestStatus.FINISHED]

    @property
    def num_of_other_length(self) -> int:
        """Number of finished requests with more or fewer tokens than were asked for."""
        return sum(each.output_tokens != each.max_tokens for each in self.finished)

    @property
    def warnings(self) -> Iterator[str]:
        """Yield warnings about what makes the measurement other than intended."""
        num_kept_back = sum(each.due_s > each.arrival_s for each in self.exchanges)
        if num_kept_back and self.max_connections < self.wanted_connections:
            yield (
                f"{num_kept_back} requests waited for one of {self.max_connections} connections, the most that the "
                "limit on open files allows; raise it (ulimit -n), or set --max-concurrency"
            )
        if num_of_other_length := self.num_of_other_length:
            why = (
                "the server may not know ignore_eos, or limits the length"
                if self.ignore_eos
                else "with --no-ignore-eos the model ends its outputs, so their lengths are not the trace's"
            )
            yield (
                f"{num_of_other_length} of {len(self.exchanges)} requests got more or fewer tokens than they "
                f"asked for: {why}"
            )
        yield from self._unmeasured()

    def _unmeasured(self) -> Iterator[str]:
        finished = self.finished
        several = [each for each in finished if each.output_tokens > 1]
        unstreamed = [each for each in finished if not each.is_streamed]
        if unstreamed:
            yield (
                f"{len(unstreamed)} of {len(finished)} finished requests got all their text at once: they have no time "
                "to first token, time per token or longest gap; the server does not stream, or a proxy holds the "
                "stream back"
            )
        unsaid = [each for each in several if each.is_streamed and not each.adds_up]
        if unsaid:
            tokens, events = _tokens_and_events(unsaid)
            yield (
                f"{len(unsaid)} of {len(finished)} finished requests have {tokens} tokens in {events} events, and the "
                "server does not say how many each event has: they have no time per token and no longest gap"
            )
        tokens, events = _tokens_and_events([each for each in several if each.tells_time_per_token])
        if tokens > (1 + TOLERANCE) * events:
            yield f"{tokens} tokens came in {events} events: the longest gap is between events, not between tokens"
        uncounted = sum(not each.usage_tokens and not each.counts_are_said for each in finished)
        if uncounted:
            yield (
                f"the server gave no usage for {uncounted} of {len(finished)} finished requests: each event with text "
                "counts as one token"
            )

    @property
    def meta(self) -> dict[str, Any]:
        """Keys of meta.json: the server, and how the client measured."""
        finished = self.finished
        return {
            "server": {"version": self.server.version, "model": dict(self.server.card)},
            "client": {
                "max_connections": self.max_connections,
                "run_id": self.run_id,
                "of_other_length": self.num_of_other_length,
                "not_streamed": sum(not each.is_streamed for each in finished),
                "tokens_unlike_events": sum(not each.adds_up for each in finished),
                "tokens_said_with_events": sum(each.counts_are_said for each in finished),
            },
        }


def _tokens_and_events(exchanges: Sequence[Exchange]) -> tuple[int, int]:
    return sum(each.output_tokens for each in exchanges), sum(len(each.token_s) for each in exchanges)
