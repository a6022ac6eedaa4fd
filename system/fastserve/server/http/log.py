"""The server's log: lines on stderr with time and level. Access lines have the level info."""

from __future__ import annotations

import logging
import sys

LOG_LEVELS = ("error", "warning", "info", "debug")

logger = logging.getLogger("fastserve.server")


def start_log(level: str) -> None:
    """Write the log of the server and of its HTTP library to stderr, from `level` up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s: %(message)s"))
    for name in (logger.name, "uvicorn"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level.upper())


def say(text: str) -> None:
    """Write a line to stderr whatever the log's level, such as the server's address."""
    print(text, file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    """Writes levels in lower case."""

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)
