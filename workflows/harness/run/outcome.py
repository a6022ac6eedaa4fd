"""What became of a run's requests: which did not finish and why, and whether that ends the run.

One rule for all backends: if no request finished, the run is an error; if some did not, the run says how many and why.
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
    """A request that did not finish: how it ended, and why; the reason begins with the request's name."""

    status: RequestStatus
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Of a run of so many requests, those that did not finish, in the order of their arrival."""

    num_requests: int
    unfinished: Sequence[Unfinished]
    folder: Path
    """Where the run's files are."""

    @property
    def error(self) -> NothingFinishedError | None:
        """What to raise if no request finished."""
        if len(self.unfinished) < self.num_requests:
            return None
        return NothingFinishedError(f"none of {self.num_requests} requests finished; {self._first}", self._where)

    @property
    def warning(self) -> str:
        """Says how many requests did not finish; empty if all did."""
        if not self.unfinished:
            return ""
        counts = Counter(each.status.value for each in self.unfinished)
        kinds = ", ".join(f"{count} {status}" for status, count in counts.items())
        return (
            f"{len(self.unfinished)} of {self.num_requests} requests did not finish ({kinds}); {self._first}; "
            f"{self._where}"
        )

    def reasons(self, *statuses: RequestStatus) -> list[str]:
        """The first reasons of those that ended so."""
        return [each.reason for each in self.unfinished if each.status in statuses][:SHOWN]

    @property
    def _first(self) -> str:
        return self.unfinished[0].reason

    @property
    def _where(self) -> str:
        return f"{self.folder / 'meta.json'} lists up to {SHOWN} reasons, requests.parquet every status"
