import itertools

import pandas as pd
import pytest

from harness.plots import caption, draw, policy_style
from harness.points import capacity_table, curve

POLICIES = {"vllm": "vLLM", "fastserve-fcfs": "FastServe-FCFS", "fastserve": "FastServe"}
META = {"commit": "0123456789abcdef-dirty", "hardware": {"cpu": "A CPU", "cores": 2, "torch_threads": 1}}


def make_experiment(kind, seeds=(0, 1)):
    series = [
        {
            "name": policy,
            "label": label,
            "policy": policy,
            "profile": "a100-80g/opt-13b-tp1",
            "settings": {},
            "paper_system": label,
            "variant": policy == "fastserve",
        }
        for policy, label in POLICIES.items()
    ]
    return {
        "kind": kind,
        "title": "A tiny figure",
        "note": "A note.",
        "trace": "fixed",
        "arrivals": "poisson",
        "seeds": list(seeds),
        "points": [{"rate": rate, "num_requests": 10} for rate in (1, 2, 4)],
        "series": series,
        "metric": "mean_normalized_latency_s",
        "slo": 0.3,
        "engine": {"model": "opt-tiny", "device": "cpu"},
    }


def make_points(experiment, latencies=(0.02, 0.2, 0.7)):
    return pd.DataFrame(
        {
            "series": series["name"],
            "label": series["label"],
            "policy": series["policy"],
            "rate": point["rate"],
            "num_requests": 10,
            "seed": seed,
            "failed": 0,
            "preemptions": 0,
            "mean_normalized_latency_s": latency * (1 + seed / 10),
            "p95_normalized_latency_s": 2 * latency,
            "output_tokens_per_s": 100.0,
        }
        for series, (point, latency), seed in itertools.product(
            experiment["series"], zip(experiment["points"], latencies, strict=True), experiment["seeds"]
        )
    )


REPORTED = pd.DataFrame({"system": "vLLM", "rate": [1.0, 2.0, 3.0], "value": [0.03, 0.02, 0.5]})
NOTHING_REPORTED = REPORTED.iloc[:0]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("kind", ["sim", "engine"])
def test_draws_png_and_pdf(tmp_path, kind, seeds):
    experiment = make_experiment(kind, seeds)
    paths = draw(experiment, make_points(experiment), REPORTED, [META], tmp_path / "figure")
    assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
    png, pdf = (path.read_bytes() for path in paths)
    assert png.startswith(b"\x89PNG")
    assert pdf.startswith(b"%PDF")
    assert min(len(png), len(pdf)) > 10_000
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written beside them


def test_without_slo_paper_or_finished_requests(tmp_path):
    experiment = make_experiment("sim") | {"slo": None}
    points = make_points(experiment)
    points.loc[points["rate"] == 4, "mean_normalized_latency_s"] = None
    points.loc[points["rate"] == 4, "failed"] = 10
    assert all(path.exists() for path in draw(experiment, points, NOTHING_REPORTED, [META], tmp_path / "figure"))


def test_only_measured_points_are_drawn():
    experiment = make_experiment("sim")
    line = curve(make_points(experiment), "vllm", "mean_normalized_latency_s")
    assert line.rates.tolist() == [1, 2, 4]
    assert line.mean == pytest.approx([0.021, 0.21, 0.735])
    assert line.low == pytest.approx([0.02, 0.2, 0.7])
    assert line.high == pytest.approx([0.022, 0.22, 0.77])


def test_capacity_table_holds_ours_against_the_papers():
    experiment = make_experiment("sim")
    table = capacity_table("tiny", experiment, make_points(experiment), REPORTED).set_index("series")
    row = table.loc["vllm"]
    assert row["capacity"] == pytest.approx(2 + 2 * (0.3 - 0.21) / (0.735 - 0.21))
    assert row["capacity_min"] < row["capacity"] < row["capacity_max"]
    assert row["paper_capacity"] == pytest.approx(2 + (0.3 - 0.02) / 0.48)
    assert row["relative_difference"] == pytest.approx(row["capacity"] / row["paper_capacity"] - 1)
    assert row["monotone"]
    assert not row["paper_monotone"]
    assert pd.isna(table.loc["fastserve", "paper_capacity"])


@pytest.mark.parametrize(
    ("latencies", "note"),
    [((0.1, 0.1, 0.2), "within the SLO at every rate"), ((0.4, 0.5, 0.6), "above the SLO at the lowest rate already")],
)
def test_a_capacity_that_was_not_reached_is_empty(latencies, note):
    experiment = make_experiment("sim")
    table = capacity_table("tiny", experiment, make_points(experiment, latencies), NOTHING_REPORTED)
    assert table[["capacity", "capacity_min", "capacity_max", "relative_difference"]].isna().all(axis=None)
    assert set(table["note"]) == {note}
    assert set(table["seeds_crossing"]) == {0}


def test_caption_says_where_the_figure_comes_from():
    text = caption(make_experiment("sim"), [META])
    for said in ("fixed", "poisson", "10 requests", "seeds 0, 1", "a100-80g/opt-13b-tp1", "A100", "0123456789 with"):
        assert said in text
    assert "A CPU (2 cores, 1 thread)" in caption(make_experiment("engine"), [META])


def test_a_policy_keeps_its_colour_and_marker():
    assert len({policy_style(policy) for policy in POLICIES}) == 3
    assert policy_style("fastserve", ["mine", "fastserve"]) == policy_style("fastserve")
    assert policy_style("mine", ["mine", "yours"]) != policy_style("yours", ["mine", "yours"])
