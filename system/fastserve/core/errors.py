"""Errors that a user can cause: the message names the wrong value and the remedy. Commands print it and exit with 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FastServeError(Exception):
    """Base of all errors that report bad input or an exhausted resource, and never a bug."""


class ConfigError(FastServeError):
    """An unknown policy, preset or option, or a value out of range."""


class CheckpointError(FastServeError):
    """A model directory is missing or incomplete, or its architecture is not supported."""


class PolicyError(FastServeError):
    """The code of a user's policy failed; the message names the policy, the error, the file and the line."""

    frames: str = ""
    """The policy's part of the traceback, as lines of text."""


class TraceError(FastServeError):
    """A trace is missing, empty or malformed; the message names the file and the line or record."""


class OutputError(FastServeError):
    """A result could not be written."""


class NothingFinishedError(FastServeError):
    """No request of a run finished: `what` happened to the first, and `where` to read about the others."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)
        self.what, self.where = what, where

    def __str__(self) -> str:
        return f"{self.what}; {self.where}"


class ServerError(FastServeError):
    """A measured server does not start, has ended, or does not answer as an OpenAI-compatible server does."""


class WorkerError(FastServeError):
    """A worker process of a search ended by itself."""


class RankError(FastServeError):
    """A rank of a distributed engine died, hangs or failed, which has ended the engine."""

    outputs: Sequence[Any] = ()
    """Outputs of the interrupted call, if there was one: finished requests, and the others as failed."""


def failure_reason(error: BaseException) -> str:
    """The message of an error; for a bug also its type, since the message may say too little: `KeyError: 'a'`."""
    if isinstance(error, FastServeError):
        return str(error)
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name
