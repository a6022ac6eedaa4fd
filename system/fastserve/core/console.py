"""The end of both commands, and their progress on stderr.

A command ends with status 0; with 2 and one line on stderr for a fault of the input or the machine; with 128 and the
number of the signal that stopped it; or with 1 and a traceback for a bug.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

import typer

from fastserve.core.errors import FastServeError, OutputError, PolicyError

TRACEBACK_VARIABLE = "FASTSERVE_TRACEBACK"
"""Environment variable; 1 prints the traceback of every error, before its line."""
BAD_INPUT, BUG = 2, 1
_SECONDS_BETWEEN_LINES = 10.0
_LONG_WORD = re.compile(r"(\S{200})\S{200,}")
"""A value in an error's line that is too long to be read."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP told the command to stop. It unwinds as Ctrl-C does."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_app(app: typer.Typer) -> None:
    """Run a command and end the process as the module says.

    Code that catches a KeyboardInterrupt, writes its results and raises it again says so with `add_note`: the notes are
    printed. Without notes, the message is "nothing was written".
    """
    raise_on_signals()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # A closed one is None.
        stream.reconfigure(errors="backslashreplace")
    if sys.stdout is not None:
        sys.stdout = _Stdout(sys.stdout)
    with exit_on_error():
        command = typer.main.get_command(app)
        invoke = command.invoke

        def run(context: Any) -> Any:
            with exit_on_error():  # Typer turns Ctrl-C into a status without a word, so it must not see it.
                return invoke(context)

        command.invoke = run  # type: ignore[assignment, method-assign]
        command()


def raise_on_signals() -> None:
    """Have SIGTERM and SIGHUP raise Terminated in the main thread. A signal that the parent ignores stays ignored."""

    def stop(signum: int, _: FrameType | None) -> None:
        for other in signals:  # A hang-up is often followed by SIGTERM, which must not end the cleaning up.
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(signum)

    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    for signum in signals:
        signal.signal(signum, stop)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with one line on stderr for a fault of the input or the machine, and for an interruption."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Terminated) else signal.SIGINT
        what = f"ended by {error}" if isinstance(error, Terminated) else "interrupted"
        _end(error, f"{what}: {'; '.join(getattr(error, '__notes__', ())) or 'nothing was written'}", 128 + signum)
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("typer", "click"):
            raise  # Typer shows a wrong option itself.
        reason = describe(error)
        if reason is None:
            traceback.print_exception(error)
            print("this is a bug, not a fault of your input: please report it with the lines above", file=sys.stderr)
            sys.exit(BUG)
        for each in (error, error.__cause__):
            if isinstance(each, PolicyError):
                print(each.frames, end="", file=sys.stderr)
        _end(error, f"error: {reason}", BAD_INPUT)


def describe(error: Exception) -> str | None:
    """One line about a fault of the input or of the machine: what it is and the remedy. None if it may be a bug."""
    if isinstance(error, FastServeError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{where}{error.strerror or str(error) or type(error).__name__}"
    if isinstance(error, UnicodeError):
        return f"text that is not UTF-8: {error}; convert the file, or the option, to UTF-8"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; check the JSON and YAML files that the command reads"
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return f"not enough memory{_because(error)}; choose fewer requests, a shorter trace or smaller caches"
    if isinstance(error, ArithmeticError):
        return f"a number is out of range{_because(error)}; check the numbers among the options and in the files"
    return None


def _is_torch_out_of_memory(error: Exception) -> bool:
    """Torch has an error of its own for a GPU's memory, and none for a CPU's."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _because(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f" ({lines[0]})" if lines else ""


def _end(error: BaseException, line: str, status: int) -> None:
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    print(_LONG_WORD.sub(r"\1...", line), file=sys.stderr)
    sys.exit(status)


class _Stdout:
    """Standard output. Failing to write is an OutputError, or, if the reader has gone as `head` does, a silent end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._giving_up():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._giving_up():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # The rest would fail again at exit.
            if error.errno == errno.EPIPE:
                sys.exit(128 + signal.SIGPIPE)
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error


class Progress:
    """Counts steps on stderr: a bar on a terminal, a line every ten seconds elsewhere. Use as a context manager.

    Both estimate the time that is left, as if the steps to come took as long as those done.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._bar: Any = None
        self._start = time.monotonic()
        self._next_line = self._start + _SECONDS_BETWEEN_LINES
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
        """Count one step. Any argument is ignored, so that it serves as a callback."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
            print(f"{self._title}: {self._done} of {self._total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
