"""Requests that do not finish: none of a run's is an error with its reason, some are said, on every backend."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fastserve.core.errors import NothingFinishedError
from fastserve.core.request import RequestStatus
from harness.analysis.capacity_result import Objective
from harness.analysis.capacity_search import find_capacity
from harness.cli import app
from harness.run.config import RunConfig
from harness.run.outcome import SHOWN, Outcome, Tally
from harness.run.runner import run
from support.openai_server import OpenAIServer, complete, refuse

SIM: dict[str, Any] = {"profile": "a100-80g/opt-13b-tp1-swifttransformer"}
ENGINE: dict[str, Any] = {
    "backend": "engine", "model": "opt-tiny", "load_format": "dummy",
    "settings": {"num_gpu_blocks": 32, "num_host_blocks": 32},
}  # fmt: skip
BACKENDS = {"sim": SIM, "engine": ENGINE}
TOO_LONG = "fixed:prompt=100000,output=10"


@pytest.mark.parametrize("backend", BACKENDS)
def test_if_nothing_finishes_the_files_are_there_and_the_first_reason_is_raised(backend: str, tmp_path: Path) -> None:
    config = RunConfig(trace=TOO_LONG, rate=50.0, num_requests=30, **BACKENDS[backend])
    with pytest.raises(NothingFinishedError) as caught:
        run(config, tmp_path)
    assert str(caught.value).startswith("none of 30 requests finished; request 0: prompt of 100000 tokens")
    assert f"; {tmp_path / 'meta.json'} lists up to {SHOWN} reasons" in str(caught.value)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert [reason.partition(":")[0] for reason in meta["rejected"]] == [f"request {i}" for i in range(SHOWN)]
    assert (meta["failed"], meta["error"]) == ([], str(caught.value))
    assert pq.read_table(tmp_path / "requests.parquet")["status"].to_pylist() == ["rejected"] * 30
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (summary["finished"], summary["failed"], summary["mean_jct_s"]) == (0, 30, None)


def mixed_trace(folder: Path) -> str:
    path = folder / "mixed.csv"
    path.write_text("prompt_tokens,output_tokens,arrival_s\n8,4,0\n100000,4,0.1\n8,4,0.2\n100001,4,0.3\n")
    return f"csv:{path}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_if_some_do_not_finish_how_many_and_why_is_said(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(trace=mixed_trace(tmp_path), arrivals="trace", num_requests=4, **BACKENDS[backend])
    summary = run(config, tmp_path / "run")
    assert (summary["finished"], summary["failed"]) == (2, 2)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said.startswith("warning: 2 of 4 requests did not finish (2 rejected); request 1: prompt of 100000 tokens")
    assert said.endswith(f"; {tmp_path / 'run/meta.json'} lists up to 20 reasons, requests.parquet every status")


def test_nothing_is_said_if_all_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(RunConfig(trace="alpaca", rate=2.0, num_requests=5, **SIM), tmp_path)
    assert capsys.readouterr().err == ""


def test_over_http_the_rule_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(backend="http", trace="fixed:prompt=4,output=3", rate=100.0, num_requests=4)
    for scripts, number in (({}, 4), ({"0": complete, "2": complete}, 2)):
        server = OpenAIServer(refuse(500, {"error": {"message": "no memory"}}), scripts=scripts)
        with server.running() as url:
            config = RunConfig(**{**vars(config), "url": url})
            if number == 4:
                with pytest.raises(NothingFinishedError, match=r"none of 4 requests finished; request 0: .*no memory"):
                    run(config, tmp_path / "none")
                continue
            assert run(config, tmp_path / "some")["finished"] == 2
    said = capsys.readouterr().err
    assert "warning: 2 of 4 requests did not finish (2 failed); request 1: HTTP 500: no memory; " in said


def test_the_command_ends_with_status_2_and_the_reason(tmp_path: Path) -> None:
    arguments = ["run", "--profile", SIM["profile"], "--trace", TOO_LONG, "--rate", "2", "--num-requests", "20"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert isinstance(result.exception, NothingFinishedError)  # `run_app` prints it and exits 2.
    assert "0 finished" not in result.output


def test_a_capacity_names_the_first_reason(tmp_path: Path) -> None:
    config = RunConfig(trace=mixed_trace(tmp_path), num_requests=20, **SIM)
    result = find_capacity(config, Objective(0.2, seeds=(0, 1), low=1, high=2), tmp_path / "out", print)
    said = "\n".join(result.describe())
    assert "requests did not finish and count in no latency; request " in said
    assert ": prompt of 10000" in said


def test_the_first_reasons_of_each_kind_are_kept() -> None:
    kinds = (RequestStatus.REJECTED, RequestStatus.FAILED, RequestStatus.ABORTED)
    tally = Tally()
    tally.add([SimpleNamespace(request_id=f"{i}", status=kinds[i % 3].value, error="no") for i in range(90)])
    tally.add([SimpleNamespace(request_id="90", status="finished", error="")])
    outcome = Outcome(tally, Path("out"))
    assert outcome.error is None
    assert outcome.warning.startswith(
        "90 of 91 requests did not finish (30 rejected, 30 failed, 30 aborted); request 0: "
    )
    assert outcome.reasons(RequestStatus.FAILED, RequestStatus.ABORTED)[:3] == [f"request {i}: no" for i in (1, 2, 4)]
    assert len(outcome.reasons(RequestStatus.REJECTED)) == SHOWN
    assert len(tally.first_unfinished) == 3 * SHOWN
    finished = Tally()
    finished.add([SimpleNamespace(request_id="0", status="finished", error="")])
    assert Outcome(finished, Path("out")).warning == ""


def test_the_error_reaches_another_process_whole() -> None:
    error = pickle.loads(pickle.dumps(NothingFinishedError("none finished", "there")))
    assert (str(error), error.what, error.where) == ("none finished; there", "none finished", "there")
