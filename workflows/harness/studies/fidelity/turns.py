"""Turns: real runs and the profiler compute one at a time, in short turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Semaphore

from fastserve.core.clock import WallClock
from fastserve.engine import EngineView, Observer
from fastserve.scheduler import Iteration

JOBS_PER_COMPANION_TURN = 3
"""Jobs that have a turn before the companion has its next one."""


class _Cancelled(Exception):
    """Ends a job that gets no further turn."""


class Turn(Observer):
    """The turns of one job. As the observer of an engine, it stops the engine's clock between turns."""

    def __init__(self, job: Callable[[Turn], object], length_s: float) -> None:
        self.length_s = length_s
        self.has_ended = False
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext
        """Gives a context in which the processes that the job has started stand still."""
        self._job = job
        self._left_s = length_s
        self._is_cancelled = False
        self._begin, self._end = Semaphore(0), Semaphore(0)

    def play(self) -> None:
        """Do the job, turn by turn. Call this in its own thread."""
        try:
            self._begin.acquire()
            if not self._is_cancelled:
                self._job(self)
        except _Cancelled:
            pass
        finally:
            self.has_ended = True
            self._end.release()

    def give(self) -> None:
        """Give the job a turn and wait until the turn is over."""
        self._begin.release()
        self._end.acquire()

    def cancel(self) -> None:
        """End the job without another turn."""
        self._is_cancelled = True
        self._begin.release()

    def yield_turn(self) -> None:
        """End this turn and wait for the next. The job calls this."""
        with self.paused():
            self._end.release()
            self._begin.acquire()
        if self._is_cancelled:
            raise _Cancelled

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Count the computing time; end the turn when its time is used up."""
        self._left_s -= end_s - start_s
        if self._left_s <= 0:
            self._left_s = self.length_s
            assert isinstance(engine.clock, WallClock)
            with engine.clock.stopped():
                self.yield_turn()


def take_turns(jobs: Sequence[Callable[[Turn], object]], companion: Callable[[Turn], object], length_s: float) -> None:
    """Do all jobs, one at a time, in rounds in which each has a turn of `length_s` seconds of computing.

    The companion has a turn after every `JOBS_PER_COMPANION_TURN` jobs and is cancelled when all jobs have ended. The
    first job that fails ends all, and its error is raised.
    """
    main = [Turn(job, length_s) for job in jobs]
    circle = list(main)
    # Each turn of the companion has its own thread: where cores are short, the system favours a thread that has rested,
    # and no thread may have rested longer than the others.
    for i in range(len(jobs), 0, -JOBS_PER_COMPANION_TURN):
        circle.insert(i, Turn(companion, length_s))
    with ThreadPoolExecutor(len(circle)) as pool:
        futures = {turn: pool.submit(turn.play) for turn in circle}
        try:
            while not all(turn.has_ended for turn in main):
                for turn in circle:
                    if not turn.has_ended:
                        turn.give()
                        if turn.has_ended:
                            futures[turn].result()
        finally:
            for turn in circle:
                turn.cancel()
