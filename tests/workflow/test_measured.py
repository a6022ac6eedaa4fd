"""Measured runs replayed: errors that are flagged, policies beside the real run, figures, and the pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from fastserve.core.errors import ConfigError
from fastserve.latency import load_profile
from harness.experiments.experiment import Experiment
from harness.experiments.folder import quick_look, read_experiments
from harness.report.captions import truth_caption, would_have_caption
from harness.report.plots import page_of
from harness.report.plots.measured import draw_policies, draw_truth
from harness.run.profile_range import BOUNDS_LEFT
from harness.studies.measured.errors import errors_page, with_peer
from harness.studies.measured.policies import METRICS, describe_policies, policies_page, policies_table
from harness.studies.measured.replay import ITERATIONS, MEASURED, SIMULATED, replay
from harness.studies.measured.table import read_requests, statistic_of, with_quantities
from harness.workload.traces.measured import measured_run

ROOT = Path(__file__).resolve().parents[2]
PEER = pd.read_csv(ROOT / "workflows/data/llmservingsim_errors.csv")
WRONG = "a100-80g/opt-13b-tp1"
"""Another model on another GPU than those measured."""


def content(**changes):
    """An experiment that replays a measured run with the times of another machine."""
    return {
        "title": "Wrong on purpose",
        "figure": "measured",
        "over": "vllm-chunked",
        "backend": "sim",
        "seeds": [0],
        "run": {
            "trace": "measured:rtxpro6000",
            "arrivals": "trace",
            "num_requests": 300,
            "profile": WRONG,
            "settings": {"max_batch_size": 128, "num_gpu_blocks": 9000},
        },
        "points": [{"x": "as recorded"}],
        "series": [
            {"name": "vllm-chunked", "label": "vLLM", "policy": "vllm-chunked"},
            {"name": "srpt", "label": "SRPT", "policy": "srpt"},
        ],
    } | changes


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    return replay(Experiment.model_validate(content()), tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def policies():
    """Made by hand: the simulator is 10 % above the measured values; SRPT is 5 % off vLLM in means, 50 % in P99."""
    real = with_quantities(read_requests(measured_run("rtxpro6000")))
    truth = {metric: statistic_of(real, metric) for metric in METRICS}
    rows = [
        {"panel": "", "series": series, "label": label, "policy": series}
        | {
            metric: 1.1 * value * (1 if series != "srpt" else means if "mean" in metric else 0.5)
            for metric, value in truth.items()
        }
        for series, label, means in (("vllm-chunked", "vLLM", 1), ("srpt", "SRPT", 1.05))
    ]
    return policies_table(Experiment.model_validate(content()), pd.DataFrame(rows))


def test_a_replay_serves_the_measured_requests_and_flags_the_wrong_machine(replayed):
    by_kind = dict(iter(replayed.requests.groupby("kind")))
    assert set(by_kind) == {MEASURED, SIMULATED}
    for column in ("request", "arrival_s", "prompt_tokens", "output_tokens"):
        assert by_kind[MEASURED][column].tolist() == by_kind[SIMULATED][column].tolist()
    assert len(replayed.errors) == 12
    assert (replayed.errors["met"] == "no").sum() >= 10
    assert set(replayed.errors["gpu"]) == {"RTX PRO 6000"}
    (row,) = replayed.runs.to_dict("records")
    assert row["requests"] == 300
    assert row["measured_makespan_s"] == pytest.approx(65.926, abs=0.01)
    assert row["simulated_preemptions"] > 0  # 9,000 blocks are too few for 128 requests.
    assert row["simulated_recomputed_tokens"] > 0


def test_batch_and_cache_over_time_are_bounded_as_the_engine_was(replayed):
    table = replayed.occupancy
    assert set(table["kind"]) == {MEASURED, SIMULATED, ITERATIONS}
    assert (table["capacity_tokens"] == 9000 * 16).all()
    assert table.loc[table["kind"] != ITERATIONS, "batch"].max() >= 128
    exact = table[table["kind"] == ITERATIONS]
    assert exact["batch"].max() <= 128
    assert 0.95 * 9000 * 16 < exact["cache_tokens"].max() <= 9000 * 16


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"trace": "sharegpt"}, "a figure of measured runs needs trace measured:NAME with arrivals trace and no rate"),
        ({"arrivals": "poisson", "rate": 10}, "not trace 'measured:rtxpro6000' with arrivals 'poisson'"),
        ({"num_requests": 200}, "has 300 requests, but the experiment replays 200; set num_requests to 300"),
    ],
)
def test_a_replay_of_something_else_is_refused(tmp_path, run, message):
    experiment = Experiment.model_validate(content(run=content()["run"] | run))
    with pytest.raises(ConfigError) as caught:
        replay(experiment, tmp_path)
    assert message in str(caught.value)


def test_requests_that_cannot_be_served_are_told(tmp_path, capsys):
    few = content()["run"] | {"settings": {"max_batch_size": 128, "num_gpu_blocks": 100}}
    with pytest.raises(ConfigError, match=r"measured:rtxpro6000: \d+ of 300 requests did not finish when simulated"):
        replay(Experiment.model_validate(content(run=few)), tmp_path)


@pytest.mark.parametrize("over", [None, "orca"])
def test_an_experiment_says_which_series_repeats_the_run(over):
    given = content(over=over)
    if over is None:
        del given["over"]
    with pytest.raises(ValueError, match="over: figures 'measured' need a series over which to show others"):
        Experiment.model_validate(given)


def test_differences_of_policies_are_held_against_the_simulators_error(policies):
    table = policies.set_index(["series", "metric"])
    for metric in METRICS:
        assert table.loc[("srpt", metric), "error"] == pytest.approx(0.1)
        assert table.loc[("srpt", metric), "over_vllm"] == pytest.approx(1.05 if "mean" in metric else 0.5)
        assert table.loc[("srpt", metric), "beyond"] == ("no" if "mean" in metric else "yes")
        assert table.loc[("vllm-chunked", metric), "beyond"] == ""
    (line,) = describe_policies(policies)
    assert line == (
        "RTX PRO 6000: 4 of 8 differences between a policy and vLLM are larger than the simulator's error; not: "
        "SRPT (4 of 8 metrics)"
    )
    page = policies_page(policies, ["mean_ttft_s", "p99_ttft_s"])
    assert "| RTX PRO 6000 | **vLLM, measured** | 7,119 | 19,824 |" in page
    assert "| RTX PRO 6000 | SRPT, simulated | ≈ 8,222 | 10,903 |" in page


def titles(figure):
    return [" ".join(axes.get_title(loc="left").split()) for axes in figure.axes]


def test_the_figure_of_errors_draws_the_tables(replayed):
    errors = with_peer(replayed.errors, PEER)
    figure = page_of(lambda: draw_truth(errors, replayed.requests, replayed.occupancy, replayed.runs, "T"), "caption")
    distributions, (batch, cache, dots) = figure.axes[:3], figure.axes[3:6]
    for axes, quantity, scale in zip(distributions, ("ttft_s", "tpot_s", "jct_s"), (1, 1000, 1), strict=True):
        for line, kind in zip(axes.lines, (MEASURED, SIMULATED), strict=False):
            values = replayed.requests.loc[replayed.requests["kind"] == kind, quantity]
            assert np.asarray(line.get_xdata()) == pytest.approx(np.sort(values) * scale)
            assert np.asarray(line.get_ydata())[-1] == 1
    assert [len(axes.lines) for axes in (batch, cache)] == [3, 4]  # The fourth is the size of the cache.
    drawn = [float(line.get_xdata()[0]) for line in dots.lines if line.get_marker() not in ("None", "")]
    assert set(np.round(100 * errors["error"], 6)) <= set(np.round(drawn, 6))
    assert -4.0 in drawn  # LLMServingSim's
    preemptions = replayed.runs["simulated_preemptions"].iloc[0]
    assert titles(figure)[4:] == [
        f"RTX PRO 6000: cache; {preemptions} preemptions simulated",
        f"RTX PRO 6000: {(errors['met'] == 'yes').sum()} of 12 errors within the goal",
    ]


def test_the_figure_of_policies_draws_the_measured_run_first_and_names_what_is_simulated(policies):
    figure = page_of(lambda: draw_policies(policies, "Simulated: T"), "caption")
    assert len(figure.axes) == 8
    for axes, metric in zip(figure.axes, [*METRICS[::2], *METRICS[1::2]], strict=True):
        own = policies[policies["metric"] == metric]
        scale = 1000 if "tpot" in metric or "normalized" in metric else 1
        widths = [bar.get_width() for bar in axes.containers[0]]
        assert widths == pytest.approx(scale * np.array([own["measured"].iloc[0], *own["simulated"]]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["vLLM, MEASURED", "vLLM", "SRPT"]


def test_captions_say_what_is_measured_and_what_is_simulated():
    experiment = Experiment.model_validate(content())
    truth, would_have = truth_caption(experiment, []), would_have_caption(experiment, [])
    assert "Measured by others on RTX PRO 6000, 96 GB: vLLM 0.19.0" in truth
    assert "max_num_seqs 128" in truth
    assert "casys-kaist/LLMServingSim, commit 5daddb2, MIT" in truth
    assert f"{WRONG}: the engine's own time is not modelled" in truth
    assert would_have.startswith("SIMULATED")
    outside = pd.DataFrame(
        {"series": ["vllm-chunked", "srpt"], "outside_profile_range": [0.0, 0.25], BOUNDS_LEFT: ["", "decodes"]}
    )
    said = "of a run's computed time"
    assert said not in truth_caption(experiment, [], outside)  # What repeats the run stayed inside.
    assert said in would_have_caption(experiment, [], outside)
    assert "GB/s" in would_have


def test_a_quick_look_has_measured_runs_whole():
    experiment = Experiment.model_validate(content())
    assert quick_look({"gpu-truth": experiment}) == {"gpu-truth": experiment}


def test_the_pipeline_makes_tables_and_figures(tmp_path):
    pytest.importorskip("snakemake")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/gpu-wrong.yaml").write_text(yaml.safe_dump(content()), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", tmp_path, "-c", "2", "--nocolor"]
    command += ["--workflow-profile", ROOT / "workflows/profiles/default", "gpu-wrong"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for extra in ([], ["--report", "report.html"]):
        done = subprocess.run(
            [*command, *extra, "--config", "experiments=experiments", "claims=null"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        f"gpu-wrong{view}.{kind}" for view in ("-policies", "") for kind in ("pdf", "png")
    ]
    results = tmp_path / "results/gpu-wrong"
    errors, points = pd.read_csv(results / "errors.csv"), pd.read_csv(results / "points.csv")
    assert (errors["met"] == "no").sum() >= 10
    own = points.set_index("series").loc["vllm-chunked"]  # The pipeline's own run of the same series.
    assert errors["simulated"].tolist() == pytest.approx([own[metric] for metric in errors["metric"]])
    page = (results / "tables.md").read_text(encoding="utf-8")
    assert page.startswith(errors_page(errors))
    assert "**vLLM, measured**" in page
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "statistics within the goal; beyond it: mean TTFT" in report
    assert "what other policies would have done is simulated" in report


def test_the_page_shows_what_the_shipped_experiment_gives(tmp_path):
    experiment = read_experiments(ROOT / "workflows/config/experiments/gpu-truth.yaml")["gpu-truth"]
    table = errors_page(with_peer(replay(experiment, tmp_path).errors, PEER))
    page = (ROOT / "docs/gpu-truth.md").read_text(encoding="utf-8")
    assert table in page, "run `make reproduce`, then python tools/write_pages.py"


@pytest.mark.parametrize(("profile", "gpu"), [("rtx4090", "RTX 4090"), ("rtxpro6000", "RTX PRO 6000")])
def test_the_profiles_state_the_errors_of_the_page(profile, gpu):
    page = (ROOT / "docs/gpu-truth.md").read_text(encoding="utf-8")
    known = load_profile(f"{profile}/llama-3.1-8b-tp1").known_error
    for quantity in ("mean TTFT", "mean TPOT", "mean completion time"):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {gpu} | {quantity} |")]
        error = row.split(" | ")[4].replace("%", " %")
        assert f"{quantity} {error}" in known, "change RECORDED_ERRORS in tools/_kernel_profiles.py"
