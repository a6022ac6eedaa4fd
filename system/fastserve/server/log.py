"""The server's log: lines on stderr with time and level. Access lines are of level info."""

from __future__ import annotations

import logging
import sys

LOG_LEVELS = ("error", "warning", "info", "debug")

logger = logging.getLogger("fastserve.server")


def start_log(level: str) -> None:
    """Write what the server and its HTTP library log, from `level` up, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s: %(message)s"))
    for name in (logger.name, "uvicorn"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level.upper())


def say(text: str) -> None:
    """Announce what the user of the command must know whatever the log's level, such as the address."""
    print(text, file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    """Levels in small letters."""

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)
