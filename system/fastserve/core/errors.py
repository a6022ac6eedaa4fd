"""Errors a user can cause. Each message names the value at fault and the remedy; the commands print it and exit 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FastServeError(Exception):
    """Base of every error that reports bad input or a resource that ran out, never a bug of ours."""


class ConfigError(FastServeError):
    """An unknown policy, preset or option, or a value out of range."""


class CheckpointError(FastServeError):
    """A model directory that is missing, incomplete, or of an architecture we do not run."""


class PolicyError(FastServeError):
    """The code of a user's policy failed; names the policy, the error, the file and the line."""

    frames: str = ""
    """The policy's part of the traceback, in lines."""


class TraceError(FastServeError):
    """A trace that is missing, empty or malformed; names the file and the line or record."""


class OutputError(FastServeError):
    """A result that could not be written."""


class NothingFinishedError(FastServeError):
    """A run of which not one request finished: `what` happened to the first, and `where` the rest is written."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)
        self.what, self.where = what, where

    def __str__(self) -> str:
        return f"{self.what}; {self.where}"


class ServerError(FastServeError):
    """A server to be measured that does not start, has ended, or does not answer as an OpenAI-compatible one does."""


class WorkerError(FastServeError):
    """A worker process of a search ended by itself."""


class RankError(FastServeError):
    """A rank of a distributed engine died, hangs or failed, and the engine has ended with it."""

    outputs: Sequence[Any] = ()
    """Of the requests of the call it ended, where there was one: the finished ones, and the others as failed."""


def failure_reason(error: BaseException) -> str:
    """What an error says; for a bug, whose message alone may say nothing, its type as well: `KeyError: 'a'`."""
    if isinstance(error, FastServeError):
        return str(error)
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name
