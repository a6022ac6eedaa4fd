"""Targets: which settings go in, the ratio and its interval, and whether it is met."""

import numpy as np
import pandas as pd
import pytest

from fastserve.core.errors import ConfigError
from harness.analysis.files import read_table, write_csv
from harness.analysis.intervals import (
    geometric_mean_of_ratios,
    largest_ratio_of_means,
    ratio_of_means,
)
from harness.analysis.points import paired
from harness.analysis.targets import COLUMNS, targets_table
from harness.experiments.experiment import Experiment

SEEDS = 4
RATIOS = {("a", 1): 0.5, ("a", 2): 0.8, ("b", 1): 0.9, ("b", 2): 1.2}
"""Of the means of new to old, by panel and x."""
METRIC = "mean_jct_s"


def make_points(ratios=RATIOS, noise=0.2):
    rng = np.random.default_rng(1)
    rows = []
    for (panel, x), ratio in ratios.items():
        old = 10 * rng.uniform(1 - noise, 1 + noise, SEEDS)
        new = rng.uniform(1 - noise, 1 + noise, SEEDS)
        new *= ratio * old.mean() / new.mean()
        for series, values in (("old", old), ("new", new)):
            place = {"panel": panel, "series": series, "label": series, "policy": series, "x": x, "run": "r"}
            rows += [place | {"seed": seed, METRIC: value} for seed, value in enumerate(values)]
    return pd.DataFrame(rows)


def table_of(points, panels=("a", "b"), **target):
    target = {"claim": "Faster", "metric": METRIC, "of": "new", "over": "old", "at_most": 1.0} | target
    experiment = {
        "title": "T",
        "figure": "bars",
        "backend": "sim",
        "seeds": list(range(SEEDS)),
        "points": [{"x": x} for x in (1, 2, 0.5, "never")],
        "series": [{"name": name, "label": name, "policy": name} for name in ("old", "new")],
        "targets": [target],
    }
    if any(panels):  # Else there is one, without a name.
        experiment |= {"panels": [{"name": name} for name in panels]}
    return targets_table(Experiment.model_validate(experiment), points)


def row_of(points, **target):
    (row,) = table_of(points, **target).to_dict("records")
    return row


def test_the_geometric_mean_is_over_every_setting_that_both_series_have():
    row = row_of(make_points(), statistic="geometric_mean")
    assert tuple(row) == COLUMNS
    assert row["value"] == pytest.approx((0.5 * 0.8 * 0.9 * 1.2) ** 0.25)
    assert row["low"] < row["value"] < row["high"]
    assert (row["settings"], row["met"], row["where"], row["at"]) == (4, "yes", "b at 2", "")
    points = make_points()
    row = row_of(points[(points["series"] == "old") | (points["panel"] == "a")], statistic="geometric_mean")
    assert (row["settings"], row["value"]) == (2, pytest.approx((0.5 * 0.8) ** 0.5))


def test_a_target_may_be_of_some_panels_and_x():
    row = row_of(make_points(), statistic="geometric_mean", at=[1.0])
    assert (row["settings"], row["value"], row["at"]) == (2, pytest.approx((0.5 * 0.9) ** 0.5), "1")
    row = row_of(make_points(), statistic="geometric_mean", at=[2], panels=["a"])
    assert (row["settings"], row["value"], row["where"]) == (1, pytest.approx(0.8), "a at 2")


def test_the_interval_of_the_largest_counts_that_it_was_chosen():
    points = make_points()
    row = row_of(points, statistic="largest")
    pairs = [paired(points, panel, "new", "old", METRIC) for panel in ("a", "b")]
    new, old = (np.column_stack([side[x] for side in sides for x in (1, 2)]) for sides in zip(*pairs, strict=True))
    estimate = largest_ratio_of_means(new, old)
    assert (row["value"], row["low"], row["high"]) == (estimate.value, estimate.low, estimate.high)
    alone = ratio_of_means(*(side[2] for side in pairs[1]))
    assert row["high"] - row["low"] > alone.high - alone.low > 0
    assert row["value"] == pytest.approx(1.2)
    assert (row["settings"], row["met"], row["where"]) == (4, "no", "b at 2")
    assert row_of(points, statistic="largest", at_most=1.2 + 1e-9)["met"] == "yes"


@pytest.mark.parametrize("statistic", ["geometric_mean", "largest"])
def test_without_every_value_nothing_is_claimed(statistic):
    points = make_points()
    points.loc[(points["panel"] == "a") & (points["seed"] == 1) & (points["series"] == "new"), METRIC] = None
    for incomplete in (points, points.dropna(), make_points().assign(**{METRIC: 0.0}), make_points().iloc[:0]):
        row = row_of(incomplete, statistic=statistic)
        assert (row["value"], row["low"], row["high"], row["met"], row["where"]) == (None, None, None, "unknown", "")
    assert row_of(points, statistic=statistic, panels=["b"])["met"] != "unknown"


def test_one_seed_has_no_interval():
    points = make_points()
    row = row_of(points[points["seed"] == 0], statistic="geometric_mean")
    assert row["value"] > 0
    assert row["low"] is row["high"] is None


def test_categories_panels_without_a_name_and_tables_from_files(tmp_path):
    points = make_points({("", 0.5): 0.5, ("", "never"): 2.0})
    write_csv(points, tmp_path / "points.csv")
    read = read_table(tmp_path / "points.csv")
    for at, value in ((["never"], 2.0), ([0.5], 0.5)):
        row = row_of(read, panels=[""], statistic="largest", at=at)
        assert (row["settings"], row["value"], row["where"]) == (1, pytest.approx(value), str(at[0]))


def test_a_metric_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"no column 'mean_ttft_s'; there are: panel, series"):
        table_of(make_points(), metric="mean_ttft_s", statistic="largest")


def test_a_seed_is_left_out_of_all_settings():
    """Where the seeds of one setting make up for those of another, the mean is certain; left out apart it is not."""
    ups = np.array([1.0, 2.0, 3.0])
    estimate = geometric_mean_of_ratios(np.column_stack([ups, 6 / ups]), np.column_stack([6 / ups, ups]))
    assert (estimate.low, estimate.high) == pytest.approx((1, 1))
    assert geometric_mean_of_ratios(ups[:, None], np.ones((3, 1))) == ratio_of_means(ups, np.ones(3))


def test_ratios_of_nothing():
    assert geometric_mean_of_ratios([[0.0, 1.0]], [[1.0, 1.0]]).value == 0
    assert geometric_mean_of_ratios([[1.0, 1.0]], [[1.0, 0.0]]).value is None
    with pytest.raises(ValueError, match="same seeds on both sides"):
        geometric_mean_of_ratios([[1.0], [1.0]], [[1.0]])
