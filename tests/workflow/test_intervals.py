"""Intervals over seeds: against the textbook, and how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from benchmarks.interval_coverage import CASES, coverage
from harness.analysis.intervals import (
    ON_PLAIN_SCALE,
    Estimate,
    estimate_of,
    known,
    largest_ratio_of_means,
    leave_one_out,
    mean_estimate,
    means_of,
    ratio_of_means,
)

few = settings(max_examples=100)
SAMPLES = arrays(float, st.integers(3, 12), elements=st.floats(0.5, 10))


@pytest.mark.parametrize("num_seeds", [3, 5, 12])
def test_of_a_mean_of_logs_the_interval_is_the_textbooks(num_seeds):
    """The log of a geometric mean is a mean, and the jackknife-t of a mean is Student's interval."""
    logs = np.random.default_rng(3).normal(size=num_seeds)

    def geometric_mean(selections):
        return known(np.exp(means_of(logs, selections)))

    estimate = estimate_of(geometric_mean, num_seeds)
    theirs = stats.ttest_1samp(logs, 0)
    assert np.log([estimate.low, estimate.high]) == pytest.approx(tuple(theirs.confidence_interval()))
    assert estimate.p_value == pytest.approx(theirs.pvalue)
    half = stats.t.ppf(0.975, num_seeds - 1) * logs.std(ddof=1) * (1 + 1 / num_seeds) ** 0.5
    assert np.log([estimate.sample_low, estimate.sample_high]) == pytest.approx(logs.mean() + np.array([-half, half]))


def test_the_error_of_a_paired_ratio_is_that_of_the_jackknife():
    over, under = np.random.default_rng(3).lognormal(size=(2, 7))
    left_out = np.log([np.delete(over, i).mean() / np.delete(under, i).mean() for i in range(7)])
    error = (6 / 7 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    away = np.exp(stats.t.ppf(0.975, 6) * error)
    estimate = ratio_of_means(over, under)
    assert estimate.value == pytest.approx(over.mean() / under.mean())
    assert (estimate.low, estimate.high) == pytest.approx((estimate.value / away, estimate.value * away))


def test_what_may_be_0_is_estimated_on_the_plain_scale_and_says_so():
    values = np.array([0.0, 0.0, 1.0, 3.0])
    estimate = mean_estimate(values)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval()))
    assert estimate.note == ON_PLAIN_SCALE
    assert mean_estimate(values + 1).note == ""
    assert mean_estimate([0.0] * 3) == Estimate(0.0, 0.0, 0.0, ON_PLAIN_SCALE, 0.0, 0.0, 0.0)  # surely not 1


@few
@given(values=SAMPLES)
def test_an_interval_contains_the_mean_and_a_samples_is_wider(values):
    estimate = mean_estimate(values)
    assert 0 < estimate.low <= estimate.value <= estimate.high
    assert 0 <= estimate.p_value <= 1
    assert (estimate.p_value < 0.05) == (not estimate.low <= 1 <= estimate.high)
    if values.std() > 0.01:
        assert estimate.sample_low < estimate.low
        assert estimate.sample_high > estimate.value


@few
@given(values=SAMPLES, scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_a_paired_ratio_of_the_same_values_is_exact(values, scale):
    estimate = ratio_of_means(values * scale, values)
    assert (estimate.value, estimate.low, estimate.high) == (scale, scale, scale)
    assert estimate.p_value == (1 if scale == 1 else 0)


@few
@given(values=arrays(float, (5, 3), elements=st.floats(0.5, 10)))
def test_the_interval_of_the_largest_covers_that_it_was_chosen(values):
    ones = np.ones_like(values)
    largest = largest_ratio_of_means(values, ones)
    alone = [ratio_of_means(column, ones[:, 0]) for column in values.T]
    assert largest.value == max(each.value for each in alone)
    assert largest.high >= max(each.high for each in alone) * (1 - 1e-9)
    best = max(alone, key=lambda each: each.value)
    assert largest.high / largest.low >= best.value / best.low * (1 - 1e-9)
    assert largest_ratio_of_means(values[:, :1], ones[:, :1]) == alone[0]
    expected = mean_estimate(values.max(axis=1))
    assert (largest.sample_low, largest.sample_high) == pytest.approx((expected.sample_low, expected.sample_high))


@pytest.mark.parametrize("num_seeds", [5, 20])
@pytest.mark.parametrize(
    ("case", "least", "most"),
    [("ratio", 0.92, 0.97), ("load", 0.89, 0.97), ("loads", 0.92, 0.97), ("largest", 0.93, 1)],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(case, least, most, num_seeds):
    held = coverage(CASES[case], num_seeds, repetitions=1000)
    assert least <= held["jackknife-t"] <= most
    assert 0.93 <= held["prediction"] <= 0.98


def test_the_bootstrap_of_five_seeds_and_of_what_was_chosen_would_not():
    assert coverage(CASES["ratio"], 5, repetitions=1000)["bootstrap"] < 0.88
    assert coverage(CASES["largest"], 20, repetitions=1000)["bootstrap"] < 0.75


def test_selections_are_of_whole_seeds():
    values = np.arange(6.0).reshape(3, 2)
    assert leave_one_out(3).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert means_of(values, leave_one_out(3)) == pytest.approx(values[leave_one_out(3)].mean(axis=1))


@pytest.mark.parametrize("is_above", [True, False])
def test_what_has_no_bound_opens_the_end_on_that_side(is_above):
    """Without the first seed only a bound of the statistic is known."""
    values = np.array([1.0, 2.0, 2.5, 4.0])

    def bounded(selections):
        means = means_of(values, selections)[:, np.newaxis]
        of_first = (selections == 0).any(axis=1, keepdims=True)
        unknown = np.where(of_first, means, np.inf if is_above else -np.inf)
        return (means, unknown) if is_above else (unknown, means)

    estimate, plain = estimate_of(bounded, 4), mean_estimate(values)
    assert estimate.value == plain.value
    if is_above:
        assert (estimate.high, estimate.sample_high) == (np.inf, np.inf)
        assert (estimate.low, estimate.sample_low) == (plain.low, plain.sample_low)
    else:
        assert (estimate.low, estimate.sample_low) == (-np.inf, -np.inf)
        assert (estimate.high, estimate.sample_high) == (plain.high, plain.sample_high)


def test_what_cannot_be_told():
    assert mean_estimate([2.5]) == Estimate(2.5)
    assert mean_estimate([2.5, 3.5]) == Estimate(3.0)
    assert mean_estimate([2.5, np.nan]) == Estimate(None, note="not every seed has a value")
    assert ratio_of_means([1, 2], [np.nan, 1]).value is None
    assert ratio_of_means([1, 2], [0, 0]) == Estimate(None, note="the denominator is 0")
    assert ratio_of_means([1, 1, 1], [0, 0, 2]) == Estimate(1.5)  # without the last seed there is no ratio
    assert ratio_of_means([3], [2]) == Estimate(1.5)
    assert largest_ratio_of_means(np.empty((3, 0)), np.empty((3, 0))).value is None


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="same seeds on both sides, not 2 and 3"):
        ratio_of_means([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one value per seed"):
        mean_estimate([])
