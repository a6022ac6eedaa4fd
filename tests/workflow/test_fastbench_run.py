"""`fastbench run`: its four files, and what it says to bad input."""

import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fastserve.core.compiled import core
from fastserve.core.errors import ConfigError, FastServeError, OutputError, TraceError
from harness.cli import app
from harness.run.config import RunConfig
from harness.run.folders import default_capacity_folder, default_folder
from harness.run.results import REQUEST_COLUMNS, RunFolder
from harness.run.runner import run
from harness.run.summary import COUNTED, Summary
from harness.workload.traces import load_trace
from support.timelines import threads_of

ROOT = Path(__file__).parents[2]
PROFILE = "a100-80g/opt-13b-tp1-swifttransformer"
SIM = ["run", "--backend", "sim", "--profile", PROFILE, "--trace", "alpaca", "--num-requests", "30"]
QUANTITIES = ("jct_s", "normalized_latency_s", "latency_per_total_token_s", "ttft_s", "tpot_s", "max_token_gap_s")
SUMMARY_KEYS = {
    "policy", "backend", "rate", "num_requests", "seed", "finished", "failed", "duration_s", "iterations",
    "output_tokens_per_s", "preemptions", "swap_out_bytes", "swap_in_bytes", "recomputed_tokens",
    "cached_prompt_tokens",
    *(f"{statistic}_{name}" for statistic in ("mean", "p50", "p90", "p95", "p99") for name in QUANTITIES),
}  # fmt: skip


@dataclass
class Finished:
    """A finished request, as far as a summary is of it."""

    arrival_s: float
    first_token_s: float
    finished_s: float
    output_tokens: int
    prompt_tokens: int = 1
    tpot_s: float = math.nan
    max_token_gap_s: float = 0.0
    status: str = "finished"


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_the_four_files_are_as_documented(tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke(*SIM, "--rate", "5", "--policy", "fastserve", "--set", "alpha_s=1", "--out", str(out))
    assert sorted(path.name for path in out.iterdir()) == [
        "iterations.parquet",
        "meta.json",
        "requests.parquet",
        "summary.json",
    ]
    requests = pq.read_table(out / "requests.parquet").to_pylist()
    assert list(requests[0]) == list(REQUEST_COLUMNS)
    assert len(requests) == 30
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS | {"outside_profile_range", "profile_bounds_left"}
    latencies = [(row["finished_s"] - row["arrival_s"]) / row["output_tokens"] for row in requests]
    assert summary["mean_normalized_latency_s"] == pytest.approx(sum(latencies) / 30)
    per_token = [(r["finished_s"] - r["arrival_s"]) / (r["prompt_tokens"] + r["output_tokens"]) for r in requests]
    assert summary["mean_latency_per_total_token_s"] == pytest.approx(sum(per_token) / 30)
    assert summary["mean_jct_s"] == pytest.approx(
        sum(row["queueing_s"] + row["swapping_s"] + row["execution_s"] for row in requests) / 30
    )
    assert summary["iterations"] == pq.read_metadata(out / "iterations.parquet").num_rows
    tokens = sum(row["output_tokens"] for row in requests)
    assert summary["output_tokens_per_s"] == pytest.approx(tokens / summary["duration_s"])
    meta = json.loads((out / "meta.json").read_text())
    assert {"commit", "versions", "core", "hardware", "configuration", "trace", "profile_range"} <= set(meta)
    assert meta["core"] == core()
    assert meta["configuration"]["policy_options"]["alpha_s"] == 1.0
    assert meta["configuration"]["engine"]["num_gpu_blocks"] == 66_144 // 16
    assert len(meta["trace"]["digest"]) == 64


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write({"mean_jct_s": None}, {"configuration": {"alpha_s": math.inf, "x": [1, math.nan]}})
    meta = json.loads((tmp_path / "meta.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert meta["configuration"] == {"alpha_s": "inf", "x": [1, "nan"]}
    metrics = [Finished(arrival_s=0.0, first_token_s=math.nan, finished_s=2.0, output_tokens=0)]
    measured = Summary()
    measured.add(metrics)  # type: ignore[arg-type]
    summary = measured.result({"iterations": 1} | dict.fromkeys(COUNTED, 0))
    assert (summary["finished"], summary["mean_jct_s"]) == (1, 2.0)
    assert summary["mean_normalized_latency_s"] is None  # 2 s over 0 tokens
    assert summary["p99_ttft_s"] is None
    json.dumps(summary, allow_nan=False)


def test_what_takes_the_place_of_other_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(trace="alpaca", rate=1.0, num_requests=3, profile=PROFILE)
    for again in (config, config, replace(config, settings={"swap": "proactive"})):  # The last is the default.
        run(again, tmp_path)
    assert capsys.readouterr().err == ""
    run(replace(config, rate=2.0, settings={"alpha_s": 1}), tmp_path)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {tmp_path} held other results of 20")
    assert "now replaced: rate was 1.0, is 2.0; alpha_s was 0.3, is 1.0; give another --out to keep both" in said
    run(replace(config, policy="vllm", trace="zipf", num_requests=4, seed=3), tmp_path)
    said = capsys.readouterr().err
    assert (
        'policy was "fastserve", is "vllm"; trace was "alpaca", is "zipf"; rate was 2.0, is 1.0; num_requests' in said
    )
    assert "more; give another --out" in said
    (tmp_path / "meta.json").write_text("[]")
    run(config, tmp_path)
    assert capsys.readouterr().err == ""


def test_a_default_folder_is_named_after_what_is_run() -> None:
    names = {
        "sim-fastserve-sharegpt-rate2-seed0": {"rate": 2.0},
        "sim-vllm-zipf-theta=1.2-min=4-rate0.5-seed3": {
            "policy": "vllm",
            "trace": "zipf:theta=1.2,min=4",
            "rate": 0.5,
            "seed": 3,
        },
        "sim-my_policy.Mine-csv-lengths-own-rate-seed0": {"policy": "my_policy:Mine", "trace": "csv:/data/lengths.csv"},
        "sim-fastserve-sharegpt-V3-rate1-seed0": {"trace": "sharegpt:~/V3.json,tokenizer=/models/opt", "rate": 1.0},
        "http-alpaca-rate1-seed0": {"backend": "http", "trace": "alpaca", "rate": 1.0},
    }
    for name, changes in names.items():
        assert default_folder(RunConfig(**changes)) == Path("results") / name
    assert default_capacity_folder(RunConfig(trace="alpaca")) == Path("results/capacity-sim-fastserve-alpaca")
    one, other = (default_folder(RunConfig(trace=f"csv:{'a/b c' * 90}{i}.csv", rate=1.0)) for i in (1, 2))
    assert one != other
    assert len(one.name) < 120
    assert re.fullmatch(r"[A-Za-z0-9._=+-]+", one.name)
    unsafe = default_folder(RunConfig(policy="../../x y.py:Z", trace="fixed:prompt=9", rate=1.0))
    assert re.fullmatch(r"[A-Za-z0-9._=+-]+", unsafe.name)
    assert unsafe.parent == Path("results")


def test_two_traces_and_rates_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for trace, rate in (("alpaca", 1), ("alpaca", 2), ("zipf", 2)):
        invoke("run", "--profile", PROFILE, "--trace", trace, "--rate", str(rate), "--num-requests", "3")
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_i7_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        invoke(*SIM, "--rate", "9", "--seed", "3", "--set", "num_gpu_blocks=300", "--out", str(tmp_path / name))
    for file in ("requests.parquet", "iterations.parquet", "summary.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_policy_gets_the_same_requests(tmp_path: Path) -> None:
    digests = set()
    for policy in ("fastserve", "fastserve-fcfs", "vllm"):
        invoke(*SIM, "--rate", "5", "--policy", policy, "--out", str(tmp_path / policy))
        digests.add(json.loads((tmp_path / policy / "meta.json").read_text())["trace"]["digest"])
    assert len(digests) == 1


def test_requests_that_never_fit_are_counted_and_explained(tmp_path: Path) -> None:
    trace = tmp_path / "lengths.csv"
    trace.write_text("prompt_tokens,output_tokens,arrival_s\n10,5,0\n100,50,0.5\n20,1,1\n")
    summary = run(
        RunConfig(
            trace=f"csv:{trace}", arrivals="trace", num_requests=3, profile=PROFILE, settings={"num_gpu_blocks": 4}
        ),
        tmp_path / "run",
    )
    assert (summary["finished"], summary["failed"], summary["rate"]) == (2, 1, None)
    (reason,) = json.loads((tmp_path / "run/meta.json").read_text())["rejected"]
    assert "request 1: prompt of 100 tokens" in reason
    rows = pq.read_table(tmp_path / "run/requests.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished", "rejected", "finished"]
    assert rows[1]["finished_s"] is None


def test_the_real_engine_writes_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    invoke(
        "run", "--backend", "engine", "--model", "opt-tiny", "--load-format", "dummy", "--device", "cpu", "--trace",
        "fixed:prompt=8,output=6", "--num-requests", "4", "--rate", "50", "--out", str(tmp_path),
        "--set", "num_gpu_blocks=32", "--set", "num_host_blocks=32", "--timeline", str(tmp_path / "timeline.json"),
    )  # fmt: skip
    assert_timeline_agrees(tmp_path / "timeline.json", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["finished"] == 4
    rows = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    for row in rows:
        assert row["arrival_s"] <= row["first_scheduled_s"] < row["first_token_s"] <= row["finished_s"]
        parts = row["queueing_s"] + row["swapping_s"] + row["execution_s"]
        assert math.isclose(parts, row["finished_s"] - row["arrival_s"], abs_tol=1e-6)


def assert_timeline_agrees(timeline: Path, out: Path) -> None:
    """Nothing overlaps, and each request's spans tile its life and add up to its row."""
    threads = threads_of(json.loads(timeline.read_text())["traceEvents"])
    for spans in threads.values():
        for before, after in itertools.pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"]
    for row in pq.read_table(out / "requests.parquet").to_pylist():
        spans = threads["requests", row["request_id"]]
        assert all(a["ts"] + a["dur"] == b["ts"] for a, b in itertools.pairwise(spans))
        assert spans[0]["ts"] / 1e6 == pytest.approx(row["arrival_s"], abs=1e-6)
        assert (spans[-1]["ts"] + spans[-1]["dur"]) / 1e6 == pytest.approx(row["finished_s"], abs=1e-6)
        totals = dict.fromkeys(("queueing_s", "swapping_s", "execution_s"), 0.0)
        for span in spans:
            part = {"queueing": "queueing_s", "waiting for swap": "swapping_s"}.get(span["name"], "execution_s")
            totals[part] += span["dur"] / 1e6
        for part, total in totals.items():
            assert total == pytest.approx(row[part], abs=1e-6), f"{part} of {row['request_id']}"


def test_a_timeline_agrees_with_the_results_and_does_not_change_them(tmp_path: Path) -> None:
    arguments = [*SIM, "--rate", "50", "--set", "num_gpu_blocks=45", "--set", "max_batch_size=4"]
    timeline = tmp_path / "new" / "timeline.json"
    invoke(*arguments, "--out", str(tmp_path / "plain"))
    invoke(*arguments, "--out", str(tmp_path / "watched"), "--timeline", str(timeline))
    for file in ("requests.parquet", "iterations.parquet", "summary.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "watched" / file).read_bytes()
    assert_timeline_agrees(timeline, tmp_path / "watched")
    rows = pq.read_table(tmp_path / "watched" / "requests.parquet").to_pylist()
    iterations = pq.read_metadata(tmp_path / "watched" / "iterations.parquet").num_rows
    assert any(row["swapping_s"] for row in rows)
    threads = threads_of(json.loads(timeline.read_text())["traceEvents"])
    assert sum("scheduled tokens" in span["args"] for span in threads["engine", "iterations"]) == iterations
    for direction in ("out", "in"):
        moved = sum(span["args"]["bytes"] for span in threads["host link", direction])
        assert moved == sum(row[f"swap_{direction}_bytes"] for row in rows) > 0


def test_a_timeline_that_cannot_be_written_is_named_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = RunConfig(trace="alpaca", rate=1.0, num_requests=2, profile=PROFILE)
    with pytest.raises(OutputError, match=r"cannot write .*timeline\.json"):
        run(config, tmp_path / "out", tmp_path / "file" / "timeline.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rate": -1.0}, ConfigError, "not -1.0"),
        ({"rate": float("nan")}, ConfigError, "not nan"),
        ({"rate": None}, ConfigError, "rate"),
        (
            {"policy": "fcfs"},
            ConfigError,
            "unknown policy 'fcfs'; known: fastserve, fastserve-artifact, fastserve-fcfs",
        ),
        ({"settings": {"alpha": "1"}}, ConfigError, "unknown option 'alpha'; valid for policy 'fastserve': swap"),
        ({"settings": {"max_batch_size": "0"}}, ConfigError, "max_batch_size must be an integer of at least 1, got 0"),
        ({"profile": None}, ConfigError, "needs --profile"),
        ({"profile": "a100"}, ConfigError, "no profile 'a100'"),
        ({"model": "opt-tiny"}, ConfigError, "--model applies to --backend engine or http only"),
        ({"backend": "engine"}, ConfigError, "needs --model"),
        ({"url": "http://127.0.0.1"}, ConfigError, "--url applies to --backend http only"),
        ({"drain_limit_s": 1.0}, ConfigError, "--drain-limit applies to --backend http only"),
        (
            {"backend": "engine", "model": "opt-tiny", "warmup": 1},
            ConfigError,
            "--warmup applies to --backend http only",
        ),
        ({"history": "alpaca"}, ConfigError, "--history 'alpaca' needs --history-requests"),
        ({"history_requests": 5}, ConfigError, "--history-requests 5 needs --history"),
        (
            {"history": "alpaca", "history_requests": -5},
            ConfigError,
            "history_requests must be an integer of at least 0, got -5",
        ),
        (
            {"history": "alpaca", "history_requests": 5},
            ConfigError,
            "policy 'fastserve' learns nothing from finished requests; --history applies to: ",
        ),
        (
            {"backend": "http", "profile": None, "history": "alpaca", "history_requests": 5},
            ConfigError,
            "--history applies to --backend sim or engine only",
        ),
        ({"backend": "gpu"}, ConfigError, "unknown backend 'gpu'; known: sim, engine, http"),
        ({"num_requests": 0}, ConfigError, "num_requests"),
        ({"trace": "csv:/nowhere.csv"}, TraceError, "/nowhere.csv"),
        ({"trace": "sharegtp"}, ConfigError, "unknown trace 'sharegtp'"),
        ({"arrivals": "uniform"}, ConfigError, "uniform"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, change: dict, error: type[FastServeError], message: str
) -> None:
    config = {"trace": "alpaca", "rate": 1.0, "num_requests": 2, "profile": PROFILE} | change
    with pytest.raises(error) as caught:
        run(RunConfig(**config), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


PUPIL = """
from fastserve.scheduler import Policy

taught = []


class Pupil(Policy):
    name = "pupil"
    learns = True

    def on_add(self, request):
        self.queue.join(request, 0)

    def learn(self, num_prompt_tokens, num_output_tokens):
        taught.append((num_prompt_tokens, num_output_tokens))
"""


@pytest.fixture
def pupil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module with a policy that records what it is taught."""
    (tmp_path / "pupil.py").write_text(PUPIL)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("pupil")
    del sys.modules["pupil"]


def test_a_policy_is_taught_lengths_of_other_requests_than_the_runs(tmp_path: Path, pupil: Any) -> None:
    taught = []
    for seed in (3, 3, 4):
        pupil.taught.clear()
        invoke(
            *SIM, "--rate", "5", "--policy", "pupil:Pupil", "--seed", str(seed), "--out", str(tmp_path / "out"),
            "--history", "alpaca", "--history-requests", "30",
        )  # fmt: skip
        taught.append(list(pupil.taught))
    first, same, other = taught
    assert first == same != other
    prompts, outputs = load_trace("alpaca").sample(30, np.random.default_rng([4, 1]))
    assert other == list(zip(prompts.tolist(), outputs.tolist(), strict=True))
    rows = pq.read_table(tmp_path / "out" / "requests.parquet").to_pylist()
    assert other != [(row["prompt_tokens"], row["output_tokens"]) for row in rows]
    configuration = json.loads((tmp_path / "out" / "meta.json").read_text())["configuration"]
    assert (configuration["history"], configuration["history_requests"]) == ("alpaca", 30)


def test_the_real_engine_is_taught_too(tmp_path: Path, pupil: Any) -> None:
    pytest.importorskip("torch")
    config = RunConfig(
        backend="engine", policy="pupil:Pupil", model="opt-tiny", load_format="dummy", rate=50.0, num_requests=2,
        trace="fixed:prompt=8,output=2", history="fixed:prompt=7,output=3", history_requests=2,
        settings={"num_gpu_blocks": 32, "num_host_blocks": 32},
    )  # fmt: skip
    assert run(config, tmp_path / "out")["finished"] == 2
    assert pupil.taught == [(7, 3), (7, 3)]


def test_a_history_that_cannot_be_read_is_named_before_the_run(tmp_path: Path, pupil: Any) -> None:
    config = RunConfig(
        policy="pupil:Pupil", trace="alpaca", rate=1.0, profile=PROFILE, history="sharegtp", history_requests=1
    )
    with pytest.raises(ConfigError, match="unknown trace 'sharegtp'"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_capacity_can_be_searched_with_a_history(tmp_path: Path, pupil: Any) -> None:
    result = CliRunner().invoke(
        app,
        ["capacity", *SIM[1:], "--policy", "pupil:Pupil", "--slo", "1e-6", "--seeds", "0", "--out", str(tmp_path),
         "--history", "alpaca", "--history-requests", "9"],
    )  # fmt: skip
    assert result.exit_code == 1, result.output  # No rate meets it.
    assert json.loads((tmp_path / "capacity.json").read_text())["configuration"]["history_requests"] == 9


def test_an_output_folder_that_cannot_be_made_is_named_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = RunConfig(trace="alpaca", rate=1.0, num_requests=2, profile=PROFILE)
    with pytest.raises(OutputError, match="cannot write to output folder"):
        run(config, tmp_path / "file" / "out")


def test_a_failed_write_keeps_the_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(trace="alpaca", rate=1.0, num_requests=2, profile=PROFILE)
    run(config, tmp_path)
    before = (tmp_path / "summary.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.run.results.pq.ParquetWriter.write_table", full)
    with pytest.raises(OutputError, match="No space left on device; earlier results there were kept"):
        run(RunConfig(trace="alpaca", rate=2.0, num_requests=2, profile=PROFILE), tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


def test_the_command_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-m", "harness.cli", "run", "--rate", "-1", "--profile", PROFILE, "--out", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_simulation_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    heavy = {"aiohttp", "matplotlib", "pandas", "prometheus_client", "rich", "scipy", "torch", "transformers"}
    code = (
        "import sys; from harness.cli import app; app(sys.argv[1:], standalone_mode=False);"
        f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", code, *SIM, "--rate", "5", "--out", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["policies", "traces", "profiles"])
def test_lists(command: str) -> None:
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0
    assert {"policies": "fastserve-fcfs", "traces": "sharegpt", "profiles": PROFILE}[command] in result.output
