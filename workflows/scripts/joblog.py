"""What every job's script shares: its output goes to its log; warnings and errors also to the user."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fastserve.core.console import exit_on_error, raise_on_signals


class _Both:
    """A text stream that writes to two. Not a terminal: jobs run side by side, and their bars would collide."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._streams = (first, second)

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def logged(path: str) -> Iterator[None]:
    """Write stdout into the log at `path`, and stderr there too; an error or a signal ends the job like a command."""
    raise_on_signals()
    with Path(path).open("w", encoding="utf-8") as log:
        both = _Both(sys.stderr, log)
        out, err = contextlib.redirect_stdout(log), contextlib.redirect_stderr(both)  # type: ignore[type-var]
        with out, err, exit_on_error():
            yield
