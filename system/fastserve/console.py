"""What both commands share: errors on one line, progress on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import typer

from fastserve.errors import ConfigError, FastServeError

_SECONDS_BETWEEN_LINES = 10.0


def run_app(app: typer.Typer) -> None:
    """Run a command; bad input ends it with one line on stderr and status 2, Ctrl-C with 130."""
    try:
        app()
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)


def parse_stage_layers(text: str | None) -> tuple[int, ...] | None:
    """`5,7` as numbers."""
    try:
        return None if text is None else tuple(int(layers) for layers in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--stage-layers takes whole numbers with commas between, such as 5,7, not {text!r}"
        ) from None


class Progress:
    """Counts steps on stderr: a bar on a terminal, a line every ten seconds elsewhere. Use as a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._bar: Any = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def advance(self, *_: object) -> None:
        """One step is done. Takes and ignores any argument, so that it serves as a callback."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{self._title}: {self._done} of {self._total}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
