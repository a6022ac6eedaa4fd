"""The outcome of a run: which requests did not finish, why, and whether that is an error.

The rule is the same for all backends: if no request finishes, the run is an error. If some requests do not finish, the
run warns how many, and why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastserve.core.errors import NothingFinishedError
from fastserve.core.request import RequestStatus

SHOWN = 20
"""Reasons of each kind that meta.json lists."""
_FINISHED = RequestStatus.FINISHED.value


class RequestRow(Protocol):
    """The part of a row of requests.parquet that says what became of the request."""

    @property
    def request_id(self) -> str:
        """Its id in the run."""

    @property
    def status(self) -> str:
        """The value of its RequestStatus."""

    @property
    def error(self) -> str:
        """Why it did not finish."""


@dataclass(frozen=True)
class Unfinished:
    """A request that did not finish: its status, and the reason, which begins with the request's name."""

    status: RequestStatus
    reason: str


class Tally:
    """Counts the requests of a run, and keeps the first reasons of each kind why some did not finish."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_unfinished: dict[RequestStatus, int] = {}
        """By status, in the order in which they first occur."""
        self.first_unfinished: list[Unfinished] = []
        """The first SHOWN of each status, in order of arrival."""

    @property
    def num_finished(self) -> int:
        """Number of requests that finished."""
        return self.num_requests - sum(self.num_unfinished.values())

    def add(self, rows: Iterable[RequestRow]) -> None:
        """Count the next requests, in order of arrival."""
        for row in rows:
            self.num_requests += 1
            if row.status != _FINISHED:
                self._add_unfinished(RequestStatus(row.status), row)

    def _add_unfinished(self, status: RequestStatus, row: RequestRow) -> None:
        count = self.num_unfinished[status] = self.num_unfinished.get(status, 0) + 1
        if count <= SHOWN:
            name = f"request {row.request_id}: "
            # An engine's reason for a rejection begins with the request's name already.
            self.first_unfinished.append(Unfinished(status, name + row.error.removeprefix(name)))


@dataclass(frozen=True)
class Outcome:
    """The number of requests of a run, and its unfinished requests."""

    tally: Tally
    folder: Path
    """The folder of the run's files."""

    @property
    def error(self) -> NothingFinishedError | None:
        """The error to raise if no request finished; else None."""
        if self.tally.num_finished:
            return None
        return NothingFinishedError(f"none of {self.tally.num_requests} requests finished; {self._first}", self._where)

    @property
    def warning(self) -> str:
        """A warning that says how many requests did not finish; empty if all finished."""
        counts = self.tally.num_unfinished
        if not counts:
            return ""
        kinds = ", ".join(f"{count} {status.value}" for status, count in counts.items())
        return (
            f"{sum(counts.values())} of {self.tally.num_requests} requests did not finish ({kinds}); {self._first}; "
            f"{self._where}"
        )

    def reasons(self, *statuses: RequestStatus) -> list[str]:
        """The first reasons of the unfinished requests with one of these statuses."""
        return [each.reason for each in self.tally.first_unfinished if each.status in statuses][:SHOWN]

    @property
    def _first(self) -> str:
        return self.tally.first_unfinished[0].reason

    @property
    def _where(self) -> str:
        return f"{self.folder / 'meta.json'} lists up to {SHOWN} reasons, requests.parquet every status"
