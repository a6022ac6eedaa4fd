"""The outcome of a run: which requests did not finish, why, and whether that is an error.

The rule is the same for all backends: if no request finishes, the run is an error. If some requests do not finish, the
run warns how many, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve.core.errors import NothingFinishedError
from fastserve.core.request import RequestStatus

SHOWN = 20
"""Reasons of each kind that meta.json lists."""


@dataclass(frozen=True)
class Unfinished:
    """A request that did not finish: its status, and the reason, which begins with the request's name."""

    status: RequestStatus
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The number of requests of a run, and its unfinished requests in order of arrival."""

    num_requests: int
    unfinished: Sequence[Unfinished]
    folder: Path
    """The folder of the run's files."""

    @property
    def error(self) -> NothingFinishedError | None:
        """The error to raise if no request finished; else None."""
        if len(self.unfinished) < self.num_requests:
            return None
        return NothingFinishedError(f"none of {self.num_requests} requests finished; {self._first}", self._where)

    @property
    def warning(self) -> str:
        """A warning that says how many requests did not finish; empty if all finished."""
        if not self.unfinished:
            return ""
        counts = Counter(each.status.value for each in self.unfinished)
        kinds = ", ".join(f"{count} {status}" for status, count in counts.items())
        return (
            f"{len(self.unfinished)} of {self.num_requests} requests did not finish ({kinds}); {self._first}; "
            f"{self._where}"
        )

    def reasons(self, *statuses: RequestStatus) -> list[str]:
        """The first reasons of the unfinished requests with one of these statuses."""
        return [each.reason for each in self.unfinished if each.status in statuses][:SHOWN]

    @property
    def _first(self) -> str:
        return self.unfinished[0].reason

    @property
    def _where(self) -> str:
        return f"{self.folder / 'meta.json'} lists up to {SHOWN} reasons, requests.parquet every status"
