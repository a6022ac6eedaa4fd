"""A run outside the range that its profile holds for says so once: on the terminal, in its files, and in captions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastserve.core.config import EngineOptions
from fastserve.core.request import Request, SamplingParams
from fastserve.latency import load_profile
from fastserve.server.model import simulated_model
from harness.analysis.points import points_table
from harness.cli import app
from harness.experiments.experiment import Experiment
from harness.experiments.points import points_of
from harness.pipeline.batch import carry_out
from harness.report.captions import provenance_caption

ROOFLINE = "a100-80g/llama-3-8b-tp1-vllm"
OUTSIDE = "of the computed time lies outside the range"


@pytest.fixture
def long_prompts(tmp_path: Path) -> str:
    """Prompts of 10,000 to 120,000 tokens, of which a public simulator's measured tables say a third of the time."""
    rows = [f"{10_000 + 110_000 * i // 9},{20 + i}" for i in range(10)]
    path = tmp_path / "long.csv"
    path.write_text("\n".join(["prompt_tokens,output_tokens", *rows]) + "\n", encoding="utf-8")
    return f"csv:{path}"


def invoke(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


def test_a_run_outside_warns_once_and_says_it_in_its_files(long_prompts: str, tmp_path: Path) -> None:
    outcome = invoke(
        *("run", "--profile", ROOFLINE, "--trace", long_prompts, "--num-requests", 10, "--rate", 0.1),
        *("--out", tmp_path / "out"),
    )
    assert outcome.exit_code == 0, outcome.output
    warnings = [line for line in outcome.stderr.splitlines() if OUTSIDE in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: 100 % {OUTSIDE} that profile {ROOFLINE} holds for")
    assert "prompts of 120,000 tokens (range to 2,048), contexts of 120,028 tokens (range to 1,024)" in warnings[0]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["outside_profile_range"] == 1.0
    assert summary["profile_bounds_left"] == {
        "prompt_tokens": {"measured": 2048, "reached": 120_000},
        "context_tokens": {"measured": 1024, "reached": 120_028},
    }
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["profile_range"] == {
        "iteration_tokens": None,
        "prompt_tokens": 2048,
        "decodes": 64,
        "context_tokens": 1024,
    }


def test_a_run_inside_does_not_warn(tmp_path: Path) -> None:
    arguments = ("run", "--trace", "alpaca", "--num-requests", 20, "--rate", 2, "--out", tmp_path / "out")
    outcome = invoke(*arguments, "--profile", ROOFLINE)
    assert outcome.exit_code == 0, outcome.output
    assert OUTSIDE not in outcome.output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["outside_profile_range"], summary["profile_bounds_left"]) == (0.0, {})


def test_a_profile_without_a_range_says_so(long_prompts: str, tmp_path: Path) -> None:
    content = load_profile(ROOFLINE).to_json()
    del content["range"]
    (tmp_path / "own.json").write_text(json.dumps(content))
    outcome = invoke(
        *("run", "--profile", tmp_path / "own.json", "--trace", long_prompts, "--num-requests", 3, "--rate", 0.1),
        *("--out", tmp_path / "out"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert OUTSIDE not in outcome.output
    assert json.loads((tmp_path / "out/meta.json").read_text())["profile_range"] == "range not known"
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["outside_profile_range"], summary["profile_bounds_left"]) == (None, None)


def test_a_search_says_it_once(long_prompts: str, tmp_path: Path) -> None:
    outcome = invoke(
        *("capacity", "--profile", ROOFLINE, "--trace", long_prompts, "--num-requests", 10, "--seeds", "0,1"),
        *("--slo", 20, "--low", 0.01, "--tolerance", 0.5, "--out", tmp_path / "out"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count(OUTSIDE) == 1


def test_the_pipeline_says_it_in_the_caption_alone(long_prompts: str) -> None:
    experiment = Experiment.model_validate(
        {
            "title": "Long prompts",
            "figure": "load",
            "backend": "sim",
            "metric": "mean_jct_s",
            "seeds": [0, 1],
            "run": {"profile": ROOFLINE, "trace": long_prompts, "num_requests": 4},
            "points": [{"rate": 0.1}],
            "series": [{"name": "fcfs", "label": "FCFS", "policy": "fastserve-fcfs"}],
        }
    )
    results = [carry_out(point.config) for point in points_of(experiment)]
    assert [result.said for result in results] == ["", ""]
    points = points_table("long", experiment, {result.name: {"metrics": result.metrics} for result in results})
    assert points["outside_profile_range"].tolist() == [1.0, 1.0]
    assert points["profile_bounds_left"].tolist() == ["prompt_tokens context_tokens"] * 2
    caption = provenance_caption(experiment, [result.meta for result in results], points)
    assert (
        "Outside the range that the profile holds for (prompt tokens, context tokens), and extrapolated: up to "
        in caption
    )
    inside = pd.DataFrame({"outside_profile_range": [0.0], "profile_bounds_left": [""]})
    assert "extrapolated" not in provenance_caption(experiment, [], inside)


def test_a_simulating_server_says_it_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    model = simulated_model(["llama"], load_profile(ROOFLINE), "fastserve-fcfs", None, EngineOptions())
    model.engine.add_request(Request("long", 0.0, 3000), SamplingParams(max_tokens=1))
    model.engine.executor.submit(model.engine.scheduler.schedule(0.0))
    assert not caplog.messages
    model.close()
    assert [message.startswith(f"100 % {OUTSIDE} that profile {ROOFLINE}") for message in caplog.messages] == [True]
