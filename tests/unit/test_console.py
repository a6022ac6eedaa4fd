"""How a command ends: the status and the line on stderr."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastserve.core.console import Terminated, describe, exit_on_error
from fastserve.core.errors import ConfigError
from support.processes import ENVIRONMENT, FASTBENCH


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | environment, capture_output=True, text=True, check=False
    )


@contextmanager
def ends_with(status: int) -> Iterator[None]:
    with pytest.raises(SystemExit) as ended:
        yield
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("unknown policy 'x'"), "unknown policy 'x'"),
        (PermissionError(13, "Permission denied", "a.json"), "a.json: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), "TimeoutError"),
        (
            MemoryError("Unable to allocate 7 TiB\nfor an array"),
            "not enough memory (Unable to allocate 7 TiB); choose ",
        ),
        (OverflowError("int too large"), "a number is out of range (int too large); check the numbers"),
        (ZeroDivisionError("division by zero"), "a number is out of range (division by zero); check the numbers"),
        (RecursionError("maximum depth"), "the input is nested too deeply; check the JSON and YAML files"),
    ],
)
def test_faults_of_the_input_and_the_machine_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ends_with(2), exit_on_error():
        raise error
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"error: {line}")


def test_text_that_is_not_utf8_is_one_line() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    assert "not UTF-8" in (describe(caught.value) or "")


def test_torch_out_of_memory_is_one_line() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert (describe(caught.value) or "").startswith("not enough memory (")
    assert (describe(torch.OutOfMemoryError("CUDA out of memory")) or "").startswith("not enough memory (CUDA")


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), TypeError("x"), AssertionError(), RuntimeError("x")])
def test_a_bug_shows_its_traceback(bug: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(bug) is None
    with ends_with(1), exit_on_error():
        raise bug
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.splitlines()[-1].startswith("this is a bug")


def test_a_variable_shows_every_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTSERVE_TRACEBACK", "1")
    with ends_with(2), exit_on_error():
        raise ConfigError("unknown")
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.splitlines()[-1] == "error: unknown"


@pytest.mark.parametrize(
    ("stop", "line", "status"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was written", 130),
        (Terminated(signal.SIGTERM), "ended by SIGTERM: nothing was written", 143),
        (Terminated(signal.SIGHUP), "ended by SIGHUP: nothing was written", 129),
    ],
)
def test_an_interruption_is_one_line_that_says_what_was_written(
    stop: KeyboardInterrupt, line: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with ends_with(status), exit_on_error():
        raise stop
    assert capsys.readouterr().err == f"{line}\n"
    stop.add_note("wrote results/x")
    with pytest.raises(SystemExit), exit_on_error():
        raise stop
    assert capsys.readouterr().err == line.replace("nothing was written", "wrote results/x") + "\n"


INTERRUPTED = """
import os, signal, typer
from fastserve.core.console import run_app
app = typer.Typer()
@app.command()
def run():
    try:
        os.kill(os.getpid(), signal.{0})
        signal.pause()
    finally:
        print("cleaned up")
run_app(app)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_unwinds_the_command(name: str, status: int) -> None:
    done = python(INTERRUPTED.format(name))
    assert (done.stdout, done.returncode) == ("cleaned up\n", status)
    assert done.stderr.endswith(": nothing was written\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_second_signal_does_not_end_the_cleaning_up() -> None:
    code = INTERRUPTED.replace('print("cleaned up")', 'os.kill(os.getpid(), signal.SIGTERM); print("cleaned up")')
    assert python(code.format("SIGHUP")).stdout == "cleaned up\n"


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + INTERRUPTED.replace(
        "signal.pause()", "print('went on')"
    )
    assert python(code.format("SIGHUP")).stdout == "went on\ncleaned up\n"


def test_a_wrong_option_is_typers_to_show() -> None:
    code = "import sys; sys.argv = ['x', 'y']; import typer, fastserve.core.console as c; app = typer.Typer(); "
    done = python(code + "app.command()(lambda count=1: None); c.run_app(app)")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "extra argument" in done.stderr


LISTING = [sys.executable, "-m", FASTBENCH, "traces"]


def test_a_reader_that_has_gone_ends_the_command_without_a_word() -> None:
    for arguments in (LISTING, [*LISTING, "--help"]):
        with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_standard_output_is_one_line() -> None:
    for arguments in (LISTING, [*LISTING, "--help"]):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run(
                arguments, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 2
        assert done.stderr == "error: cannot write to standard output: No space left on device\n"


def test_a_terminal_without_unicode_is_no_fault() -> None:
    code = "import typer, fastserve.core.console as c; app = typer.Typer(); "
    done = python(code + "app.command()(lambda: print('3 × 4')); c.run_app(app)", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.returncode) == ("3 \\xd7 4\n", 0)
