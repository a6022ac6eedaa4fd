"""Loads of one series over another's, in every panel: comparisons.csv."""

import pandas as pd
import pytest

from fastserve.core.errors import ConfigError
from harness.analysis.comparisons import COLUMNS, comparisons_table
from harness.experiments.experiment import Experiment
from harness.experiments.files import parse_as
from harness.experiments.points import points_of

RATES = (1, 2, 4)
SERIES = [
    {"name": "fcfs", "label": "FCFS", "policy": "fastserve-fcfs", "paper_system": "FastServe-FCFS", "up_to": 4},
    {"name": "base", "label": "FastServe", "policy": "fastserve", "paper_system": "FastServe"},
    {
        "name": "more",
        "label": "More memory",
        "policy": "fastserve",
        "by_panel": {"b": {"settings": {"num_gpu_blocks": 9}}},
    },
]
VALUES = {"fcfs": (0.1, 0.5, 1.5), "base": (0.1, 0.2, 0.4), "more": (0.1, 0.1, 0.2)}
"""At each rate: 0.3 is crossed at 1.5, at 3 and nowhere."""


def content(**changes):
    return {
        "title": "T",
        "figure": "comparisons",
        "backend": "sim",
        "seeds": [0, 1, 2],
        "slo": 0.3,
        "run": {"trace": "fixed", "profile": "a100-40g/opt-13b-tp1", "num_requests": 5},
        "points": [{"rate": rate} for rate in RATES],
        "panels": [{"name": "a", "paper": {"figure": "fig11"}}, {"name": "b"}],
        "series": SERIES,
        "comparisons": [
            {"label": "as it is", "of": "base", "over": "fcfs"},
            {"label": "more memory", "of": "more", "over": "fcfs"},
        ],
    } | changes


def experiment(**changes):
    return parse_as(Experiment, content(**changes), "tiny.yaml")


def points(*left_out):
    rows = [
        {"panel": panel, "series": series, "seed": seed, "x": rate, "mean_normalized_latency_s": value}
        for panel in ("a", "b")
        for series, values in VALUES.items()
        for rate, value in zip(RATES, values, strict=True)
        for seed in (0, 1, 2)
        if (panel, series) not in left_out
    ]
    return pd.DataFrame(rows)


def reported():
    rows = [
        {"panel": "a", "source": source, "system": system, "rate": rate, "value": value}
        for source, times in (("paper", 1), ("rerun", 2))
        for system, load in (("FastServe-FCFS", 1.0), ("FastServe", 3.0 * times))
        for rate, value in ((load - 0.5, 0.2), (load + 0.5, 0.4))
    ]
    return pd.DataFrame(rows)


def test_a_row_for_each_panel_and_comparison_that_has_points():
    table = comparisons_table(experiment(), points(("b", "fcfs")), reported())
    assert list(table.columns) == list(COLUMNS)
    first, second = table.to_dict("records")  # Panel b has no FCFS.
    assert (first["panel"], first["label"]) == ("a", "as it is")
    assert (first["of_load"], first["over_load"], first["ratio"]) == pytest.approx((3, 1.5, 2))
    assert (first["low"], first["high"]) == pytest.approx((2, 2))
    assert (first["paper_ratio"], first["paper_over_load"]) == pytest.approx((3, 1))
    assert (first["rerun_ratio"], first["rerun_over_load"]) == pytest.approx((6, 1))
    assert (second["label"], pd.isna(second["ratio"])) == ("more memory", True)
    assert second["note"] == "numerator within the SLO at every rate"


def test_a_series_may_have_a_further_part_in_some_panels():
    blocks = {
        (point.panel, point.series): point.config.settings.get("num_gpu_blocks") for point in points_of(experiment())
    }
    assert {place: found for place, found in blocks.items() if found} == {("b", "more"): 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": []}, "comparisons are of loads within the SLO: give both `comparisons` and `slo`"),
        ({"slo": None}, "give both `comparisons` and `slo`"),
        ({"comparisons": [{"label": "x", "of": "bsae", "over": "fcfs"}]}, "'bsae' is none of the series"),
        ({"comparisons": 2 * content()["comparisons"][:1]}, "labels of comparisons must differ"),
        ({"series": [*SERIES[:2], SERIES[2] | {"by_panel": {"c": {}}}]}, "'c' is none of the panels; there are: a, b"),
    ],
)
def test_comparisons_of_what_is_not_there_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**changes)
