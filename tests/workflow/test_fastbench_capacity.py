"""`fastbench capacity`: what it searches, finds, says and writes."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result as Outcome
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastserve.core.errors import ConfigError, NothingFinishedError, OutputError
from fastserve.core.processes import worker_pool
from harness.analysis.capacity_result import METRICS, Objective, Result
from harness.analysis.capacity_search import bisect, find_capacity
from harness.cli import app
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.workload.traces import RecordedLengths, reading
from harness.workload.traces.formats import LengthFormat
from harness.workload.traces.reading import read_lengths

PROFILE = "a100-80g/opt-13b-tp1-swifttransformer"
TRACE = "fixed:prompt=64,output=16"
SLO, SEEDS, NUM_REQUESTS = 0.05, (0, 1, 2), 60
METRIC = "mean_normalized_latency_s"
SEARCH = ["--profile", PROFILE, "--trace", TRACE, "--num-requests", str(NUM_REQUESTS), "--seeds", "0,1,2"]


def invoke(*arguments: object) -> Outcome:
    return CliRunner().invoke(app, ["capacity", *map(str, arguments)])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("found") / "new"
    outcome = invoke(*SEARCH, "--slo", SLO, "--low", 4, "--out", out)
    assert outcome.exit_code == 0, outcome.output
    return out, outcome


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "capacity.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_capacity_lies_where_a_grid_of_runs_has_it(found: tuple[Path, Outcome], tmp_path: Path) -> None:
    result = json.loads((found[0] / "capacity.json").read_text())
    within, beyond = result["bracket"]
    assert within <= result["capacity"] <= beyond <= within * 1.02
    grid = {}
    for rate in (0.8 * within, 0.95 * within, within, beyond, 1.05 * beyond, 1.3 * beyond):
        config = RunConfig(trace=TRACE, rate=rate, num_requests=NUM_REQUESTS, profile=PROFILE)
        summaries = [run(RunConfig(**{**vars(config), "seed": seed}), tmp_path / "run") for seed in SEEDS]
        grid[rate] = [summary[METRIC] for summary in summaries]
    assert [np.mean(values) <= SLO for values in grid.values()] == [True] * 3 + [False] * 3
    measured = {(float(row["rate"]), int(row["seed"])): float(row[METRIC]) for row in rows_of(found[0])}
    for rate in (within, beyond):
        assert [measured[rate, seed] for seed in SEEDS] == grid[rate]


def test_what_is_written(found: tuple[Path, Outcome]) -> None:
    out, outcome = found
    assert sorted(path.name for path in out.iterdir()) == ["capacity.csv", "capacity.json"]
    rows = rows_of(out)
    assert list(rows[0]) == ["rate", "seed", "finished", "failed", METRIC]
    assert [float(row["rate"]) for row in rows] == sorted(float(row["rate"]) for row in rows)
    assert [int(row["seed"]) for row in rows[:4]] == [0, 1, 2, 0]
    assert {row["finished"] for row in rows} == {str(NUM_REQUESTS)}
    result = json.loads((out / "capacity.json").read_text())
    low, high = result["interval"]
    assert low <= result["capacity"] <= high
    assert result["monotone"]
    assert result["objective"] | {"slo": SLO, "metric": METRIC, "seeds": list(SEEDS)} == result["objective"]
    assert result["configuration"]["num_requests"] == NUM_REQUESTS
    assert result["configuration"]["policy_options"]["alpha_s"] == 0.3
    assert not {"rate", "seed"} & set(result["configuration"])
    assert {"commit", "versions", "hardware"} <= set(result)
    assert f"capacity {result['capacity']:.4g} requests/s" in outcome.stdout
    assert f"95 % interval {low:.4g} to {high:.4g} requests/s, by jackknife-t over 3 seeds" in outcome.stdout
    assert outcome.stderr.count("within the SLO") + outcome.stderr.count("above the SLO") == len(rows) / len(SEEDS)


def test_the_same_search_writes_the_same_bytes(found: tuple[Path, Outcome], tmp_path: Path) -> None:
    objective = Objective(SLO, METRIC, SEEDS, low=4.0)
    config = RunConfig(trace=TRACE, num_requests=NUM_REQUESTS, profile=PROFILE)
    find_capacity(config, objective, tmp_path, lambda _: None)
    for name in ("capacity.csv", "capacity.json"):
        assert (tmp_path / name).read_bytes() == (found[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--slo", "0.03", "--low", "900"],
            f"{METRIC} exceeds 0.03 already at the lowest, 900 requests/s; lower --low",
        ),
        (
            ["--slo", "3", "--low", "3", "--high", "10"],
            f"{METRIC} is within 3 at every rate up to 10 requests/s; raise",
        ),
    ],
)
def test_where_no_rate_is_a_capacity(tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = invoke(*SEARCH, *arguments, "--seeds", "1", "--out", tmp_path)
    assert outcome.exit_code == 1
    assert f"no capacity: {message}" in outcome.stdout
    assert "interval" not in outcome.stdout
    result = json.loads((tmp_path / "capacity.json").read_text())
    assert (result["capacity"], result["interval"]) == (None, None)
    assert "the SLO at" in result["note"]
    assert len(rows_of(tmp_path)) in (1, 3)  # 900, or 3, 6 and 10


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    outcome = invoke(
        *SEARCH, "--slo", 1, "--seeds", "2", "--tolerance", "0.5", "--metric", "p95_jct_s", "--out", tmp_path
    )
    assert outcome.exit_code == 0, outcome.output
    assert "no interval: it needs 3 seeds" in outcome.stdout
    assert json.loads((tmp_path / "capacity.json").read_text())["interval"] is None


def test_the_real_engine(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    outcome = invoke(
        "--backend", "engine", "--model", "opt-tiny", "--load-format", "dummy", "--trace", "fixed:prompt=8,output=4",
        "--num-requests", 3, "--seeds", "0", "--slo", 1e-6, "--low", 100, "--metric", "mean_ttft_s",
        "--set", "num_gpu_blocks=32", "--set", "num_host_blocks=32", "--out", tmp_path,
    )  # fmt: skip
    assert outcome.exit_code == 1, outcome.output
    result = json.loads((tmp_path / "capacity.json").read_text())
    assert result["configuration"]["model"] == "opt-tiny"
    assert all(float(row["mean_ttft_s"]) > 0 for row in rows_of(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slo", "nan"], "--slo must be a number above 0"),
        (["--slo", "0"], "--slo must be a number above 0"),
        (["--slo", "1", "--metric", "jct_s"], "unknown metric 'jct_s'; valid: mean_jct_s, p50_jct_s"),
        (["--slo", "1", "--metric", "output_tokens_per_s"], "unknown metric 'output_tokens_per_s'"),
        (["--slo", "1", "--seeds", "1,x"], "--seeds takes whole numbers with commas between, such as 0,1,2, not '1,x'"),
        (["--slo", "1", "--seeds", "1,1"], "--seeds must be different whole numbers of at least 0, not [1, 1]"),
        (["--slo", "1", "--seeds", "-1"], "not [-1]"),
        (["--slo", "1", "--low", "0"], "0 < low < high, not 0 and 1000"),
        (["--slo", "1", "--high", "inf"], "0 < low < high, not 0.5 and inf"),
        (["--slo", "1", "--tolerance", "0"], "--tolerance must be at least 0.0001 and below 1, not 0"),
        (["--slo", "1", "--policy", "fcfs"], "unknown policy 'fcfs'"),
        (["--slo", "1", "--seeds", "0", "--set", "alpha=1"], "unknown option 'alpha'"),
        (
            ["--slo", "1", "--seeds", "0", "--set", "num_gpu_blocks=1"],
            "at 0.5 requests/s, none of 60 requests finished; request 0: prompt of 64 tokens",
        ),
        (
            ["--slo", "1", "--seeds", "0,1", "--set", "num_gpu_blocks=1"],
            "at 0.5 requests/s, none of 60 requests finished; request 0: prompt of 64 tokens",
        ),
        (
            ["--slo", "1", "--seeds", "0", "--trace", "fixed:prompt=9,output=1", "--metric", "mean_tpot_s"],
            "mean_tpot_s is unknown for the run with seed 0 (60 requests finished, 0 did not): no request has it",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = invoke(*SEARCH, *arguments, "--out", tmp_path)
    assert isinstance(outcome.exception, ConfigError | NothingFinishedError | OutputError), outcome.output
    assert message in str(outcome.exception)
    assert "\n" not in str(outcome.exception)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_before_any_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*capacity\.csv"):
        find_capacity(RunConfig(profile=PROFILE), Objective(0.3), tmp_path / "file" / "out", pytest.fail)


def test_a_failed_write_keeps_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up({1.0: [0.1, 0.2], 2.0: [0.3, 0.5]})
    result.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        made_up({1.0: [0.1, 0.2], 4.0: [0.3, 0.5]}).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_search_of_another_objective_says_what_it_replaces(tmp_path: Path) -> None:
    first = made_up({1.0: [0.1, 0.2], 2.0: [0.3, 0.5]})
    assert first.write(tmp_path) == first.write(tmp_path) == ""
    other = replace(first, objective=replace(first.objective, slo=0.4))
    assert f"{tmp_path} held other results, now replaced: slo was 0.3, is 0.4" in other.write(tmp_path)


def test_a_search_reads_a_trace_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes have what it has read."""
    monkeypatch.setattr(reading, "_read", {})
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "64,16\n70,20\n" * 50)
    config = RunConfig(trace=f"csv:{path}", num_requests=NUM_REQUESTS, profile=PROFILE)
    read = []

    def once(format_: LengthFormat, *how: Any) -> RecordedLengths:
        read.append(format_.kind)
        return read_lengths(format_, *how)

    monkeypatch.setattr("harness.workload.traces.read_lengths", once)
    found = find_capacity(config, Objective(SLO, seeds=(0, 1), low=4), tmp_path / "out", lambda line: None)
    assert found.capacity.value is not None
    assert read == ["csv"]
    carried = reading.files_read()
    with worker_pool(1, partial(reading.take_over, carried)) as pool:
        assert list(pool.submit(reading.files_read).result()) == list(carried)


def made_up(values: dict[float, list[float]], failed: int = 0) -> Result:
    summaries = {
        rate: [{"rate": rate, "seed": i, "finished": 10 - failed, "failed": failed, METRIC: value} for i, value in row]
        for rate, row in ((rate, list(enumerate(row))) for rate, row in values.items())
    }
    unfinished = "request 3: too long" if failed else ""
    seeds = tuple(range(len(next(iter(values.values())))))
    return Result(Objective(0.3, METRIC, seeds), summaries, {"commit": None}, unfinished)


def test_what_casts_doubt_on_a_result_is_said(tmp_path: Path) -> None:
    falls = made_up({1.0: [0.2, 0.2], 2.0: [0.1, 0.1], 4.0: [0.5, 0.3]}, failed=4)
    said = "\n".join(falls.describe())
    assert f"not monotone: {METRIC} falls by up to 50.0% where the rate rises" in said
    assert "24 of 60 requests did not finish and count in no latency; request 3: too long; `fastbench run`" in said
    falls.write(tmp_path)
    assert not json.loads((tmp_path / "capacity.json").read_text())["monotone"]
    rises = "\n".join(made_up({1.0: [0.1, 0.1], 4.0: [0.5, 0.3]}).describe())
    assert "monotone" not in rises
    assert "did not finish" not in rises


def test_a_bound_that_is_touched_is_met() -> None:
    touching = Result(
        Objective(0.1, METRIC, (0, 1, 2)),
        {rate: [{"finished": 1, "failed": 0, METRIC: 0.1}] * 3 for rate in (1.0, 2.0)},  # 3 * 0.1 / 3 exceeds 0.1
        {},
    )
    assert touching.bracket == (2.0, None)
    assert "is within 0.1 at every rate up to 2 requests/s" in next(touching.describe())


def test_an_open_end_is_said(tmp_path: Path) -> None:
    result = made_up({1.0: [0.1] * 3, 2.0: [0.1] * 3, 4.0: [0.9, 0.2, 0.2]})
    assert "above 4 requests/s" in "\n".join(result.describe())
    result.write(tmp_path)
    low, high = json.loads((tmp_path / "capacity.json").read_text())["interval"]
    assert high is None
    assert 0 < low < 4
    assert "interval below 1 to" in "\n".join(made_up({1.0: [0.65, 0.05, 0.05], 2.0: [0.6, 0.4, 0.4]}).describe())


@given(
    capacity=st.floats(0.01, 3000), low=st.floats(0.1, 10), span=st.floats(1.5, 200), tolerance=st.floats(0.001, 0.5)
)
def test_a_search_brackets_the_capacity_and_stays_between_its_limits(
    capacity: float, low: float, span: float, tolerance: float
) -> None:
    measured: dict[float, float] = {}

    def measure(rate: float) -> float:
        assert rate not in measured
        measured[rate] = 0.1 if rate <= capacity else 0.5
        return measured[rate]

    bisect(measure, Objective(0.3, low=low, high=low * span, tolerance=tolerance))
    within = [rate for rate, value in measured.items() if value <= 0.3]
    beyond = [rate for rate, value in measured.items() if value > 0.3]
    assert low <= min(measured) <= max(measured) <= low * span
    if capacity < low:
        assert list(measured) == [low]
    elif not beyond:
        assert max(within) == low * span <= capacity
    else:
        assert max(within) <= capacity < min(beyond) <= max(within) * (1 + tolerance)


def test_every_metric_is_a_key_of_a_summary(tmp_path: Path) -> None:
    summary = run(RunConfig(trace=TRACE, rate=1.0, num_requests=2, profile=PROFILE), tmp_path)
    assert set(METRICS) == {key for key in summary if key.endswith("_s") and key[0] in "mp"}
