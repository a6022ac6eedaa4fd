"""Runs that others measured on GPUs: the shipped tables, the trace that replays them, and the errors against them."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fastserve.core.errors import ConfigError
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.measured.errors import JUDGED, describe_errors, errors_of, errors_page, with_peer
from harness.studies.measured.occupancy import from_iterations, from_requests
from harness.studies.measured.table import COLUMNS, check_table, read_requests, statistic_of, with_quantities
from harness.workload.traces.builtin import BUILTIN
from harness.workload.traces.measured import measured_run, measured_run_of, measured_runs
from harness.workload.workload import make_workload
from tools import build_measured_runs

PEER = pd.read_csv(Path(__file__).parents[2] / "workflows/data/llmservingsim_errors.csv")


def requests(**changes):
    """Three requests, valid unless changed."""
    columns = {
        "request": [0, 1, 2],
        "arrival_s": [0.0, 0.5, 0.5],
        "scheduled_s": [0.0, 0.4999, 1.0],
        "first_token_s": [0.1, 0.7, 2.0],
        "finished_s": [1.1, 0.7, 6.0],
        "prompt_tokens": [10, 20, 30],
        "output_tokens": [11, 1, 5],
    }
    return pd.DataFrame(columns | changes)


@pytest.mark.parametrize("name", list(measured_runs()))
def test_a_shipped_run_is_whole_and_is_a_trace(name):
    measured = measured_run(name)
    table = read_requests(measured)
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 300
    assert table["request"].tolist() == list(range(300))
    workload = make_workload(f"measured:{name}", "trace", None, 300, 0)
    assert workload.arrival_s.tolist() == table["arrival_s"].tolist()
    assert workload.prompt_tokens.tolist() == table["prompt_tokens"].tolist()
    assert workload.output_tokens.tolist() == table["output_tokens"].tolist()
    assert not workload.questions
    for text in (measured.gpu, measured.engine, "MIT", "5daddb2"):
        assert text in workload.description
    assert measured_run_of(f"measured:{name}") == measured


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtx4090", {"mean_ttft_s": 65.457, "p99_ttft_s": 137.356, "mean_tpot_s": 0.0324, "mean_jct_s": 86.578}),
        ("rtxpro6000", {"mean_ttft_s": 7.097, "p99_ttft_s": 19.755, "mean_tpot_s": 0.0325, "mean_jct_s": 28.201}),
    ],
)
def test_the_tables_have_the_published_means(name, expected):
    # The published ones count from the engine's queue, some 25 ms after the client has sent the request.
    table = with_quantities(read_requests(measured_run(name)))
    for metric, seconds in expected.items():
        assert statistic_of(table, metric) == pytest.approx(seconds, rel=0.005)


def test_the_list_of_traces_names_every_run():
    assert BUILTIN["measured"].usage == f"measured:{'|'.join(measured_runs())}"
    with pytest.raises(ConfigError, match="'measured:rtx5090': no such run; measured: rtx4090, rtxpro6000"):
        make_workload("measured:rtx5090", "trace", None, 1, 0)
    assert measured_run_of("sharegpt") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_token_s": [0.1, None, 2.0]}, "x.csv, line 3: first_token_s must be a number, not nan"),
        ({"output_tokens": [11, 1, 0]}, "x.csv, line 4: output_tokens must be at least 1, not 0"),
        (
            {"finished_s": [0.05, 0.7, 6.0]},
            "x.csv, line 2: arrival_s, scheduled_s, first_token_s, finished_s must",
        ),
        ({"scheduled_s": [0.0, 0.4, 1.0]}, "x.csv, line 3: arrival_s, scheduled_s"),
        ({"arrival_s": [0.0, 0.5, 0.4]}, "x.csv, line 4: it arrives before the request above it; sort by arrival_s"),
    ],
)
def test_a_table_that_no_run_leaves_is_refused_with_its_line(changes, message):
    check_table(requests(), "x.csv")
    with pytest.raises(ConfigError) as caught:
        check_table(requests(**changes), "x.csv")
    assert str(caught.value).startswith(message)


def test_a_table_without_a_column_or_rows_is_refused():
    with pytest.raises(ConfigError, match=r"x\.csv, line 1: no column finished_s; it has request, arrival_s"):
        check_table(requests().drop(columns="finished_s"), "x.csv")
    with pytest.raises(ConfigError, match=r"x\.csv: no requests in it"):
        check_table(requests().iloc[:0], "x.csv")


def test_the_tool_makes_a_table_of_a_recording(tmp_path, monkeypatch, capsys):
    recording = tmp_path / "recording.csv"
    requests(first_token_s=[0.10004, 0.7, 2.0]).assign(queued_s=0.0).iloc[[1, 0, 2]].to_csv(recording, index=False)
    table = build_measured_runs.build(recording)
    assert list(table.columns) == list(COLUMNS)
    assert table["first_token_s"].tolist() == [0.1, 0.7, 2.0]

    requests().drop(columns="arrival_s").to_csv(recording, index=False)
    monkeypatch.setattr(sys, "argv", ["build", f"rtx4090={recording}"])
    with pytest.raises(SystemExit) as ended:
        build_measured_runs.main()
    assert ended.value.code == 2
    assert f"{recording}: no column arrival_s; it has request, scheduled_s" in capsys.readouterr().err


def test_quantities_are_those_of_a_run():
    table = with_quantities(requests())
    assert table["ttft_s"].tolist() == pytest.approx([0.1, 0.2, 1.5])
    assert table["jct_s"].tolist() == pytest.approx([1.1, 0.2, 5.5])
    assert table["tpot_s"].tolist() == pytest.approx([0.1, np.nan, 1.0], nan_ok=True)
    assert statistic_of(table, "mean_tpot_s") == pytest.approx(0.55)
    assert statistic_of(table, "p50_normalized_latency_s") == pytest.approx(0.2)


def test_a_simulation_on_the_wrong_gpu_is_flagged(tmp_path):
    """The same requests with the times of another model and GPU: the table of errors must say so."""
    config = RunConfig(
        policy="vllm-chunked", profile="a100-80g/opt-13b-tp1", trace="measured:rtxpro6000", arrivals="trace",
        num_requests=300, settings={"max_batch_size": 128, "chunk_tokens": 2048, "num_gpu_blocks": 34000},
    )  # fmt: skip
    summary = run(config, tmp_path)
    measured = with_quantities(read_requests(measured_run("rtxpro6000")))
    simulated = with_quantities(pd.read_parquet(tmp_path / "requests.parquet"))
    wrong = pd.DataFrame(errors_of(measured, simulated))
    assert wrong["metric"].tolist() == [
        f"{statistic}_{quantity}" for quantity in JUDGED for statistic in ("mean", "p50", "p90", "p99")
    ]
    assert wrong["simulated"].tolist() == pytest.approx([summary[metric] for metric in wrong["metric"]])
    assert (wrong["met"] == "no").all()
    assert wrong.set_index("metric")["error"]["mean_jct_s"] > 0.5

    right = pd.DataFrame(errors_of(measured, measured))
    assert (right["met"] == "yes").all()
    slower = pd.DataFrame(errors_of(measured, measured.assign(jct_s=measured["jct_s"] * 1.04)))
    assert slower[slower["met"] == "no"]["metric"].tolist() == ["mean_jct_s"]  # 4 %: a mean's goal is 3 %

    table = with_peer(slower.assign(run="rtxpro6000", gpu="RTX PRO 6000"), PEER)
    assert table.set_index("metric")["llmservingsim_error"].dropna().to_dict() == {
        "mean_ttft_s": -0.04,
        "mean_jct_s": -0.018,
    }
    (line,) = describe_errors(table)
    assert line == "RTX PRO 6000: 11 of 12 statistics within the goal; beyond it: mean completion time +4.0%"
    page = errors_page(table)
    assert "| RTX PRO 6000 | mean completion time | 28,222 | 29,351 | +4.0% | 3% | no | -1.8% |" in page
    assert page.count("not published") == 10


def test_the_peers_errors_are_of_runs_and_metrics_there_are():
    known = {f"{statistic}_{quantity}" for statistic in ("mean", "p50", "p90", "p99") for quantity in JUDGED}
    assert set(PEER["run"]) == set(measured_runs())
    assert set(PEER["metric"]) <= known
    assert not PEER.duplicated(["run", "metric"]).any()


def test_occupancy_from_requests_spreads_tokens_between_first_and_last():
    times = np.array([0.05, 0.6, 3.0, 6.0])
    table = from_requests(requests(), times)
    assert table["batch"].tolist() == [1, 2, 1, 0]
    assert table["cache_tokens"].tolist() == pytest.approx([10, 10 + 5.5 + 20, 30 + 1.25, 0])


def test_occupancy_from_iterations_is_that_of_the_iteration_under_way():
    iterations = pd.DataFrame(
        {"start_s": [1.0, 2.0, 5.0], "end_s": [2.0, 3.0, 6.0], "num_requests": [1, 2, 3], "free_gpu_blocks": [9, 8, 7]}
    )
    table = from_iterations(iterations, np.array([0.5, 1.0, 2.5, 4.0, 5.5, 6.0]), 10, 16)
    assert table["batch"].tolist() == [0, 1, 2, 0, 3, 0]
    assert table["cache_tokens"].tolist() == [0, 16, 32, 0, 48, 0]
