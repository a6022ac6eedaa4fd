"""Time. Nothing else in the engine reads it, so that a run under virtual time is the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Clock(Protocol):
    """Seconds since the start of a run."""

    def now(self) -> float:
        """Current time in seconds."""
        ...

    def sleep_until(self, when: float) -> None:
        """Return once `now()` is at least `when`."""
        ...


class WallClock:
    """Real time, monotonic, from the moment it is first read: loading a model is not part of a run."""

    def __init__(self) -> None:
        self._origin: float | None = None
        self._stopped_at: float | None = None

    def now(self) -> float:
        """Seconds of real time since the first call, without those in which the clock was stopped."""
        stopped_at = self._stopped_at
        if stopped_at is not None:
            return stopped_at
        time_now = time.perf_counter()
        if self._origin is None:
            self._origin = time_now
        return time_now - self._origin

    def sleep_until(self, when: float) -> None:
        """Sleep until `when`; returns at once if it has passed."""
        while (left := when - self.now()) > 0:
            time.sleep(left)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No time passes within, for any thread; not to be nested, and nobody may sleep on the clock meanwhile."""
        at = self._stopped_at = self.now()
        try:
            yield
        finally:
            self._origin = time.perf_counter() - at
            self._stopped_at = None


class VirtualClock:
    """Simulated time: moves only when told to, never backwards."""

    __slots__ = ("_now",)

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Simulated seconds."""
        return self._now

    def sleep_until(self, when: float) -> None:
        """Jump to `when`; a time that has passed leaves the clock alone."""
        if when > self._now:
            self._now = when
