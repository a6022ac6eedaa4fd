"""Clocks: the only source of time for the engine, so that it runs the same in virtual time."""

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
    """Real, monotonic time since the clock was first read: loading a model is not part of a run."""

    def __init__(self) -> None:
        self._origin: float | None = None
        self._stopped_at: float | None = None

    def now(self) -> float:
        """Seconds since the first call, without the time in which the clock was stopped."""
        stopped_at = self._stopped_at
        if stopped_at is not None:
            return stopped_at
        time_now = time.perf_counter()
        if self._origin is None:
            self._origin = time_now
        return time_now - self._origin

    def sleep_until(self, when: float) -> None:
        """Sleep until `when` (seconds); returns at once if it has passed."""
        while (left := when - self.now()) > 0:
            time.sleep(left)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within, the clock stands still for all threads. Do not nest, and do not sleep on the clock meanwhile."""
        at = self._stopped_at = self.now()
        try:
            yield
        finally:
            self._origin = time.perf_counter() - at
            self._stopped_at = None


class VirtualClock:
    """Simulated time: moves only by `sleep_until`, never backwards."""

    __slots__ = ("_now",)

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Current simulated time in seconds."""
        return self._now

    def sleep_until(self, when: float) -> None:
        """Move the clock to `when` (seconds); does nothing if that has passed."""
        if when > self._now:
            self._now = when
