"""Recorder: takes what a run records as it happens, so that the engine keeps none of it."""

from __future__ import annotations

from typing import Protocol

from fastserve.engine.iteration_log import IterationLog
from fastserve.engine.job import Job

CHUNK = 8192
"""Iterations that are handed on at a time, at least."""


class Recorder(Protocol):
    """Takes the jobs and the iteration records of a run. What it does between two steps of the engine delays them."""

    def add_job(self, job: Job) -> None:
        """Take the job of a request, in order of arrival. The engine keeps changing it until `job.is_done`."""

    def add_iterations(self, iterations: IterationLog) -> None:
        """Take the next iterations, in order; usually CHUNK or a few more."""
