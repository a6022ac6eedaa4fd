"""Bootstrap intervals over seeds: against scipy's, and how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from harness.analysis.intervals import Estimate, estimate_of, mean_estimate, mean_of_draws, ratio_of_means, seed_draws

few = settings(max_examples=100)
SAMPLES = arrays(float, st.integers(2, 12), elements=st.floats(0.5, 10))


@pytest.mark.parametrize("num_seeds", [5, 12])
def test_as_scipy_has_it(num_seeds):
    rng = np.random.default_rng(3)
    over, under = rng.lognormal(size=(2, num_seeds))
    theirs = stats.bootstrap((over,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    ours = mean_estimate(over)
    assert ours.value == pytest.approx(over.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=0.05)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis=axis) / b.mean(axis=axis)

    theirs = stats.bootstrap(
        (over, under), ratio, method="percentile", paired=True, vectorized=True, n_resamples=20_000, rng=1
    ).confidence_interval
    ours = ratio_of_means(over, under)
    assert ours.value == pytest.approx(over.mean() / under.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=0.05)


def test_an_interval_holds_the_mean_of_normal_samples_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    estimates = [mean_estimate(rng.normal(1, 1, 30)) for _ in range(400)]
    held = np.mean([estimate.low <= 1 <= estimate.high for estimate in estimates])
    assert 0.90 <= held <= 0.98


@few
@given(values=SAMPLES)
def test_an_interval_contains_the_mean(values):
    estimate = mean_estimate(values)
    assert values.min() * (1 - 1e-9) <= estimate.low <= estimate.value * (1 + 1e-9)
    assert estimate.value * (1 - 1e-9) <= estimate.high <= values.max() * (1 + 1e-9)


@few
@given(values=SAMPLES, scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_a_paired_ratio_of_the_same_values_is_exact(values, scale):
    assert ratio_of_means(values * scale, values) == Estimate(scale, scale, scale)


def test_draws_are_of_whole_seeds():
    draws = seed_draws(3)
    values = np.arange(6.0).reshape(3, 2)
    assert mean_of_draws(values, draws) == pytest.approx(values[draws].mean(axis=1))
    assert set(np.unique(draws)) == {0, 1, 2}
    seed_draws.cache_clear()
    assert np.array_equal(seed_draws(3), draws)


@pytest.mark.parametrize("infinity", [-np.inf, np.inf])
def test_infinities_are_ends_not_gaps(infinity):
    values = np.array([1.0, 2.0, infinity])
    estimate = estimate_of(lambda draws: np.median(values[draws], axis=1), 3)  # 7 of 27 draws are infinite
    assert estimate.value == (2.0 if infinity > 0 else 1.0)
    assert sorted([estimate.low, estimate.high]) == [estimate.low, estimate.high]
    assert (estimate.high if infinity > 0 else estimate.low) == infinity
    assert np.isfinite(estimate.low if infinity > 0 else estimate.high)


def test_what_cannot_be_told():
    assert mean_estimate([2.5]) == Estimate(2.5)
    assert mean_estimate([2.5, np.nan]) == Estimate(None, note="not every seed has a value")
    assert ratio_of_means([1, 2], [np.nan, 1]).value is None
    assert ratio_of_means([1, 2], [0, 0]) == Estimate(None, note="the denominator is 0")
    assert ratio_of_means([1, 2], [0, 2]) == Estimate(1.5)  # a draw of the first seed alone has no ratio
    assert ratio_of_means([3], [2]) == Estimate(1.5)


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="same seeds on both sides, not 2 and 3"):
        ratio_of_means([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one value per seed"):
        mean_estimate([])
