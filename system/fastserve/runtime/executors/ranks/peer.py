"""Peer: one rank as the engine knows it, from what it said last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastserve.runtime.parallel.channel import Channel, Message


@dataclass(eq=False)
class Peer:
    """A rank, the channel to it and its health. Times are in seconds on the monotonic clock."""

    rank: int
    channel: Channel
    hello: dict[str, Any]
    """Its first message: process, machine, versions."""
    place: str = ""
    """Its part of the model, as text."""
    last_heard: float = 0.0
    last_progress: float = 0.0
    count: int = -1
    """Its progress counter, as last reported."""
    busy: bool = False
    waiting_for: str = ""
    """Which other ranks it waits for, as text; empty while it computes."""
    failure: Message | None = None
    """Its report of an error."""
    gone: str = ""
    """Why the connection has ended; empty while it is open."""

    def __str__(self) -> str:
        place = f"{self.place}, " if self.place else ""
        return f"rank {self.rank} ({place}pid {self.hello['pid']} on {self.hello['host']})"

    @property
    def is_lost(self) -> bool:
        """Whether the rank has failed or its connection has ended."""
        return bool(self.gone) or self.failure is not None

    @property
    def failed_waiting(self) -> bool:
        """Whether it reported an error while it waited for another rank: probably not the cause."""
        return self.failure is not None and bool(self.failure.fields["waiting_for"])

    def note(self, messages: Iterable[Message], now: float) -> None:
        """Update its health from messages received at `now`."""
        self.last_heard = now
        for message in messages:
            if message.kind == "failed":
                self.failure = message
            elif message.kind == "alive":
                busy, count = message.numbers
                if not busy or not self.busy or count != self.count:
                    self.last_progress = now
                self.busy, self.count, self.waiting_for = bool(busy), count, message.fields["waiting_for"]
            else:
                self.last_progress = now
