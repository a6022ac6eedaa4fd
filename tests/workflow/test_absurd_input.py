"""Whatever is given to the commands, they end with a result or with one line: never with a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastserve.cli import app as fastserve_app
from fastserve.core.console import describe
from fastserve.core.errors import FastServeError
from harness.cli import app as fastbench_app

PROFILE = "a100-80g/opt-13b-tp1-swifttransformer"
SMALL = ["--profile", PROFILE, "--trace", "fixed:prompt=8,output=4", "--num-requests", "3"]
BASES = {
    "run": [*SMALL, "--rate", "2"],
    "capacity": [*SMALL, "--slo", "0.3", "--seeds", "0", "--low", "4", "--high", "8"],
}
INTS = ("-1", "0", "1", "3", "10000000000", "9223372036854775807", "9223372036854775808", "1" + "0" * 40, "1" * 5000)
FLOATS = ("-1", "0", "1e-320", "1e-300", "1e300", "1e400", "nan", "inf", "-inf", "0x10")
TEXTS = (
    "",
    " ",
    "x",
    "..",
    "/",
    "/dev/null",
    "\udcff",
    "é",
    "a" * 5000,
    "%s",
    "{}",
    ":",
    ",",
    "=",
    "a:b",
    "\x1b[0m",
    "~",
)
SPECS = (
    "fixed:prompt=-1", "fixed:prompt=1e99", "fixed:prompt=nan", "fixed:output=0", "fixed:x=1", "fixed:", "fixed:prompt",
    "zipf:theta=nan", "zipf:theta=1e300", "zipf:min=5,max=1", "zipf:max=1e18", "bimodal:cv=1e300", "bimodal:share=2",
    "sharegpt-client:share=2", "sharegpt-client:filter=no", "csv:/", "csv:/dev/null", "sharegpt:/",
    "gamma:cv=0", "gamma:cv=nan", "gamma:cv=1e300", "gamma:cv=1e-300", "gamma:", "constant:x", "trace",
)  # fmt: skip
NOT_FUZZED = ("--out", "--timeline", "--help", "--version", "--url", "--torch-threads")
"""Those that write, ask a network, or only the real engine takes."""

VALUES = st.one_of(st.sampled_from(INTS + FLOATS + TEXTS + SPECS), st.text(max_size=12), st.floats().map(repr))


def options_of(app: typer.Typer, command: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    return [option.opts[0] for option in group.commands[command].params if option.opts[0] not in NOT_FUZZED]


SETTINGS = (
    "max_batch_size",
    "token_budget",
    "block_size",
    "num_gpu_blocks",
    "num_host_blocks",
    "swap_space_gib_per_gpu",
    "max_model_len",
    "swap",
)
GIVEN = {
    command: st.one_of(
        st.tuples(st.sampled_from(options_of(fastbench_app, command)), VALUES),
        st.tuples(st.just("--set"), st.tuples(st.sampled_from(SETTINGS), VALUES).map("=".join)),
    )
    for command in BASES
}


def check(done: Result) -> None:
    error = done.exception
    if error is None or isinstance(error, SystemExit):
        return
    assert isinstance(error, Exception), repr(error)
    assert describe(error) is not None, f"{type(error).__name__}: {error}"
    if isinstance(error, FastServeError):
        assert "\n" not in str(error)


@pytest.mark.parametrize("command", BASES)
def test_no_option_of_fastbench_gives_a_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(GIVEN[command], min_size=1, max_size=3))
    def fuzz(given_options: list[tuple[str, str]]) -> None:
        words = [word for pair in given_options for word in pair]
        if command == "capacity" and {"--high", "--low"} & set(words):
            words += ["--high", "8"]  # Rates that are doubled without end are slow, not wrong.
        check(CliRunner().invoke(fastbench_app, [command, *BASES[command], "--out", "out", *words]))

    fuzz()


@pytest.mark.parametrize("name", ["profile", "serve"])
def test_no_option_of_fastserve_gives_a_traceback(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there, so that nothing is computed."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    fixed = ["--model", "opt-tiny", "--load-format", "dummy", "--device", "meta"]
    fixed += ["--out", "p.json"] if name == "profile" else ["--port", "0"]
    known = [option for option in options_of(fastserve_app, name) if option not in ("--device", "--ranks", "--model")]

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.sampled_from(known), VALUES), min_size=1, max_size=3))
    def fuzz(given_options: list[tuple[str, str]]) -> None:
        words = [word for option, value in given_options if value != "sim" for word in (option, value)]
        check(CliRunner().invoke(fastserve_app, [name, *fixed, *words]))

    fuzz()


@pytest.mark.parametrize("kind", ["sharegpt", "alpaca", "mooncake", "azure", "burstgpt", "csv", "bailian"])
def test_no_content_of_a_trace_gives_a_traceback(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace"
    numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -1, 0, "x", None, True, "9" * 400]))
    names = st.sampled_from([
        "prompt_tokens", "output_tokens", "arrival_s", "timestamp", "input_length", "output_length", "hash_ids",
        "conversations", "from", "value", "instruction", "input", "output", "chat_id", "TIMESTAMP", "ContextTokens",
        "GeneratedTokens", "Request tokens", "Response tokens", "Timestamp",
    ])  # fmt: skip
    values = st.recursive(
        st.one_of(numbers, st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4)),
        max_leaves=8,
    )
    tables = st.lists(names, min_size=1, max_size=4).flatmap(
        lambda header: st.lists(st.lists(numbers, max_size=4), max_size=4).map(
            lambda rows: "\n".join(",".join(map(str, row)) for row in [header, *rows]).encode()
        )
    )
    contents = st.one_of(
        values.map(lambda value: json.dumps(value).encode()),
        st.lists(values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        tables,
        st.binary(max_size=30),
        st.just(b"[" * 100_000),
        st.just(b'{"a":' * 100_000),
    )

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(contents)
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        arguments = ["run", "--profile", PROFILE, "--trace", f"{kind}:{path}", "--rate", "2", "--num-requests", "2"]
        check(CliRunner().invoke(fastbench_app, [*arguments, "--out", "out"]))

    fuzz()
