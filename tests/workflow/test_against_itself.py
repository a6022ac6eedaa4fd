"""The A/A test: equal series rarely differ from themselves, and intervals that are too narrow are found out."""

import numpy as np
import pandas as pd
import pytest

import harness.analysis.against_itself as module
from harness.analysis.against_itself import COLUMNS, NUM_SPLITS, against_itself_table, shares, splits
from harness.analysis.intervals import Estimate
from harness.experiments.experiment import Experiment

SERIES = ("fast", "slow")
RATES = (1, 2, 3, 4, 5, 6)


def experiment(**changes):
    keys = {
        "title": "t",
        "figure": "load",
        "backend": "sim",
        "seeds": list(range(20)),
        "slo": 0.3,
        "points": [{"rate": rate} for rate in RATES],
        "series": [{"name": name, "label": name, "policy": name} for name in SERIES],
    }
    return Experiment.model_validate(keys | changes)


def points(num_seeds, spread=0.3, rng=None):
    rng = rng or np.random.default_rng(1)
    rows = [
        {"panel": "", "series": series, "seed": seed, "x": rate, "mean_normalized_latency_s": load * 2.0**rate}
        for series, slope in (("fast", 0.015), ("slow", 0.03))
        for seed in range(num_seeds)
        for load in [slope * rng.lognormal(0, spread)]
        for rate in RATES
    ]
    return pd.DataFrame(rows)


def test_sides_share_no_seed_and_are_the_same_at_every_call():
    drawn = list(splits(20))
    assert [len(one) for one, _ in drawn] == [5] * NUM_SPLITS + [10] * NUM_SPLITS
    assert all(len({*one, *other}) == 2 * len(one) for one, other in drawn)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, splits(20), strict=True) for a, b in [(a[0], b[0])])
    assert [len(one) for one, _ in splits(7)] == [3] * NUM_SPLITS
    assert list(splits(5)) == list(splits(0)) == []


def test_a_series_rarely_differs_from_itself():
    """Over many made-up experiments: 5 % is the share over all of them, not in each."""
    rng = np.random.default_rng(3)
    tables = [against_itself_table({"e": (experiment(), points(20, rng=rng))}) for _ in range(8)]
    assert tuple(tables[0]) == COLUMNS
    assert tables[0][["series", "seeds_a_side", "comparisons"]].values.tolist() == [
        [series, size, NUM_SPLITS] for size in (5, 10) for series in SERIES
    ]
    total = shares(pd.concat(tables))
    assert total["seeds_a_side"].tolist() == [5, 10]
    assert total["share"].between(0.02, 0.07).all()
    assert (total["share_adjusted"] <= total["share"]).all()


def test_intervals_that_are_too_narrow_are_found_out(monkeypatch):
    ratio_of_capacities = module.ratio_of_capacities

    def with_half_the_interval(*sides, **options):
        estimate = ratio_of_capacities(*sides, **options)
        shows_a_difference = not estimate.low * estimate.value <= 1 <= estimate.high * estimate.value
        return Estimate(estimate.value, p_value=0.01 if shows_a_difference else 0.5)

    monkeypatch.setattr(module, "ratio_of_capacities", with_half_the_interval)
    total = shares(against_itself_table({"e": (experiment(), points(20))}))
    assert (total["share"] > 0.1).all()


@pytest.mark.parametrize(("changes", "num_seeds"), [({"slo": None}, 20), ({}, 5), ({}, 0)])
def test_what_has_no_load_or_too_few_seeds_has_no_rows(changes, num_seeds):
    found = points(num_seeds) if num_seeds else points(1).iloc[:0]
    keys = {key: value for key, value in changes.items() if value is not None}
    one = experiment(**keys).model_copy(update=changes)
    assert against_itself_table({"e": (one, found)}).empty
    assert shares(against_itself_table({})).empty
