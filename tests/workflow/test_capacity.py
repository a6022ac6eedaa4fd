import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from harness.analysis.capacity import (
    capacity_estimate,
    capacity_of,
    crossings,
    first_upward_crossing,
    is_monotone,
    largest_fall,
    ratio_of_capacities,
)
from harness.analysis.intervals import Estimate

VALUES = st.lists(st.floats(0, 10), min_size=1, max_size=12)
BOUNDS = st.floats(0.01, 10) | st.integers(1, 80).map(lambda n: n / 8)
CURVES = arrays(
    float, st.tuples(st.integers(3, 6), st.integers(2, 8)), elements=st.integers(0, 80).map(lambda n: n / 8)
)
"""Values by seed and rate; few enough different ones that curves touch their bounds."""
few = settings(max_examples=100)
RATES = [1, 2, 3, 4]
ATTAINMENT = np.array([[1.0, 0.97, 0.90, 0.20], [1.0, 0.99, 0.92, 0.30], [1.0, 0.98, 0.91, 0.25]])


@pytest.mark.parametrize(
    ("rates", "values", "bound", "expected"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.4], 0.3, 2.5),
        ([1, 2, 4], [0.1, 0.2, 0.2], 0.3, None),  # never reached, and not extrapolated
        ([1, 2], [0.4, 0.5], 0.3, None),  # broken before the first point
        ([1, 2, 3, 4], [0.1, 0.5, 0.1, 0.5], 0.3, 1.5),  # the first of two
        ([1, 2, 3], [0.1, 0.3, 0.3], 0.3, None),  # touching the bound is within it
        ([1, 2, 3], [0.3, 0.3, 0.6], 0.3, 2.0),
        ([1], [0.1], 0.3, None),
        ([], [], 0.3, None),
    ],
)
def test_first_upward_crossing(rates, values, bound, expected):
    assert first_upward_crossing(rates, values, bound) == (None if expected is None else pytest.approx(expected))


def test_crossing_of_the_papers_own_points():
    # Fig 11a, FastServe-FCFS: 2.41 requests/s.
    assert first_upward_crossing([2, 2.25, 2.5, 3], [0.091, 0.13, 0.403, 0.849], 0.3) == pytest.approx(2.4057, abs=1e-4)


@pytest.mark.parametrize(
    ("rates", "values", "message"),
    [
        ([1, 1], [0.1, 0.2], "rise strictly"),
        ([2, 1], [0.1, 0.2], "rise strictly"),
        ([1, np.nan], [0.1, 0.2], "rise strictly"),
        ([1, 2], [0.1, np.nan], "finite"),
        ([1, 2], [0.1, np.inf], "finite"),
        ([1, 2], [0.1], "as many rates"),
    ],
)
def test_what_is_no_curve_is_refused(rates, values, message):
    with pytest.raises(ValueError, match=message):
        first_upward_crossing(rates, values, 0.3)


@given(values=VALUES, bound=BOUNDS)
def test_crossing_lies_between_the_last_point_within_and_the_first_beyond(values, bound):
    rates = np.arange(1.0, len(values) + 1)
    rate = first_upward_crossing(rates, values, bound)
    if rate is None:
        assert values[0] > bound or max(values) <= bound
    else:
        assert all(value <= bound for value, at in zip(values, rates, strict=True) if at < rate)
        beyond = int(np.argmax(np.asarray(values) > bound))
        assert rates[beyond - 1] <= rate <= rates[beyond]


@given(values=VALUES, bounds=st.tuples(st.floats(0, 9.9), st.floats(0, 9.9)))
def test_a_looser_bound_is_never_crossed_earlier(values, bounds):
    curve = [0.0, *values, 10.0]  # crosses every bound
    tight, loose = (first_upward_crossing(range(len(curve)), curve, bound) for bound in sorted(bounds))
    assert tight <= loose


@given(values=VALUES)
def test_a_fall_is_what_is_not_monotone(values):
    assert is_monotone(sorted(values))
    assert is_monotone(values) == (largest_fall(values) == 0)
    assert 0 <= largest_fall(values) <= 1


def test_largest_fall_is_a_share_of_the_highest_before():
    assert largest_fall([1, 4, 3, 5, 4.5]) == pytest.approx(0.25)
    assert not is_monotone([1, float("nan"), 2])


@few
@given(values=CURVES, bound=BOUNDS)
def test_crossings_are_those_of_each_curve(values, bound):
    rates = np.arange(1.0, values.shape[1] + 1)
    for crossing, curve in zip(crossings(rates, values, bound), values, strict=True):
        alone = first_upward_crossing(rates, curve, bound)
        if alone is None:
            assert crossing == (-np.inf if curve[0] > bound else np.inf)
        else:
            assert crossing == alone


@few
@given(values=CURVES, bound=BOUNDS, shift=st.floats(0, 100), scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_crossings_move_with_their_curves(values, bound, shift, scale):
    rates = np.arange(1.0, values.shape[1] + 1)
    plain = crossings(rates, values, bound)
    assert crossings(rates + shift, values, bound) == pytest.approx(plain + shift)
    assert np.array_equal(crossings(rates * scale, values, bound), plain * scale)
    assert np.array_equal(crossings(rates, values * scale, bound * scale), plain)
    assert np.array_equal(crossings(rates, 10 - values, 10 - bound, falling=True) > 0, plain > 0)


def test_a_share_falls_below_its_bound():
    assert crossings(RATES, ATTAINMENT, 0.95, falling=True) == pytest.approx([2 + 2 / 7, 2 + 4 / 7, 2 + 3 / 7])
    estimate = capacity_estimate(RATES, ATTAINMENT, 0.95, falling=True)
    assert estimate.value == pytest.approx(2 + 3 / 7)
    left_out = np.log([2 + 3.5 / 7, 2 + 2.5 / 7, 2 + 3 / 7])
    error = (2 / 3 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    away = np.exp(stats.t.ppf(0.975, 2) * error)
    assert (estimate.low, estimate.high) == pytest.approx((estimate.value / away, estimate.value * away))
    assert capacity_of(RATES, [0.9, 0.8, 0.7, 0.6], 0.95, falling=True) == (
        None,
        "below the SLO at the lowest rate already",
    )
    assert capacity_of(RATES, [1, 1, 0.95, 0.95], 0.95, falling=True) == (None, "within the SLO at every rate")


@few
@given(values=CURVES, bound=BOUNDS)
def test_an_interval_contains_its_value_where_latency_rises(values, bound):
    values = np.cumsum(values, axis=1)
    rates = np.arange(1.0, values.shape[1] + 1)
    estimate = capacity_estimate(rates, values, bound)
    assert estimate.low <= estimate.high
    if estimate.value is not None:
        assert estimate.low <= estimate.value * (1 + 1e-9)
        assert estimate.high >= estimate.value * (1 - 1e-9)
    left_out = [crossings(rates, np.delete(values, seed, axis=0).mean(axis=0), bound) for seed in range(len(values))]
    if estimate.value is not None:
        assert (estimate.high == np.inf) >= (max(left_out) == np.inf)
        assert (estimate.low == -np.inf) == (min(left_out) == -np.inf)


@few
@given(values=CURVES, bound=BOUNDS, scale=st.sampled_from([0.25, 2.0]))
def test_a_paired_ratio_of_the_same_curves_is_exact(values, bound, scale):
    values = np.cumsum(values, axis=1)
    rates = np.arange(1.0, values.shape[1] + 1)
    alone = capacity_estimate(rates, values, bound)
    ratio = ratio_of_capacities((rates * scale, values), (rates, values), bound)
    if alone.value is None:
        assert ratio.value is None
        assert ratio.note == f"numerator {alone.note}; denominator {alone.note}"
    else:
        assert ratio.value == scale
    if alone.value is not None and np.all(np.isfinite(crossings(rates, values, bound))):
        assert (ratio.low, ratio.high) == (scale, scale)


@few
@given(over=CURVES, under=CURVES, bound=BOUNDS)
def test_a_ratio_turned_over(over, under, bound):
    seeds = min(len(over), len(under))
    curves = [(np.arange(1.0, values.shape[1] + 1), np.cumsum(values[:seeds], axis=1)) for values in (over, under)]
    ratio, inverse = ratio_of_capacities(*curves, bound), ratio_of_capacities(*reversed(curves), bound)
    assert (ratio.value is None) == (inverse.value is None)
    if ratio.value is not None:
        assert ratio.value == pytest.approx(1 / inverse.value)
    ends = [(ratio.low, inverse.high), (ratio.high, inverse.low)]
    ends += [(ratio.sample_low, inverse.sample_high), (ratio.sample_high, inverse.sample_low)]
    for end, other in ends:
        assert end == pytest.approx(np.inf if other == 0 else 1 / other)
    assert ratio.p_value == pytest.approx(inverse.p_value)


def test_open_ends():
    # Without the first seed, or the last, the SLO is not broken; nor is it by the second alone.
    half = [[0.1, 0.2, 0.45], [0.1, 0.1, 0.1], [0.1, 0.2, 0.45]]
    estimate = capacity_estimate([1, 2, 3], half, 0.3)
    assert estimate.value == pytest.approx(2 + (0.3 - 0.5 / 3) / (1.0 / 3 - 0.5 / 3))
    assert 0 < estimate.low < estimate.value
    assert (estimate.high, estimate.sample_high) == (np.inf, np.inf)
    below = capacity_estimate([1, 2], [[0.2, 0.4], [0.5, 0.6], [0.35, 0.5]], 0.3)
    assert (below.value, below.note) == (None, "above the SLO at the lowest rate already")
    assert (below.low, below.sample_low) == (-np.inf, -np.inf)
    assert 1 < below.high < np.inf


def test_a_ratio_of_what_was_not_reached_is_bounded():
    rates = [1, 2, 4]
    crossing = [[0.1, 0.2, 0.4]] * 3  # at 3
    never, always = np.full((3, 3), 0.1), np.full((3, 3), 0.5)
    at_least = ratio_of_capacities((rates, never), (rates, crossing), 0.3)
    assert (at_least.value, at_least.note) == (None, "numerator within the SLO at every rate")
    assert (
        (at_least.low, at_least.high) == (at_least.sample_low, at_least.sample_high) == (pytest.approx(4 / 3), np.inf)
    )
    assert at_least.p_value == 0  # surely a gain
    at_most = ratio_of_capacities((rates, always), (rates, crossing), 0.3)
    assert (at_most.value, at_most.note) == (None, "numerator above the SLO at the lowest rate already")
    assert (at_most.low, at_most.high) == (at_most.sample_low, at_most.sample_high) == (0, pytest.approx(1 / 3))
    assert at_most.p_value == 0  # surely a loss
    nothing = ratio_of_capacities((rates, never), (rates, never), 0.3)
    assert (nothing.value, nothing.low, nothing.high, nothing.p_value) == (None, 0.0, np.inf, 1)
    far = ratio_of_capacities((rates, never), (rates, always), 0.3)
    assert (far.value, far.low, far.high) == (None, 4.0, np.inf)


def test_rounding_does_not_break_a_bound_that_is_touched():
    for bound in np.arange(0.1, 10, 0.1):
        for num_seeds in (3, 5, 6, 7):
            estimate = capacity_estimate([1, 2], np.full((num_seeds, 2), bound), bound)
            assert (estimate.value, estimate.low, estimate.high) == (None, np.inf, np.inf)
            assert estimate.note == "within the SLO at every rate"


def test_pairing_removes_what_the_requests_have_in_common():
    rates = np.arange(1.0, 11)
    load = np.array([0.8, 0.9, 1.0, 1.1, 1.2])[:, np.newaxis]  # of the requests of each seed
    slow, fast = 0.1 * load * rates, 0.05 * load * rates
    assert ratio_of_capacities((rates, fast), (rates, slow), 0.3).low > 1.99
    ratio = ratio_of_capacities((rates, fast), (rates, slow[::-1]), 0.3)
    assert ratio.low < 1.85


def test_what_is_missing_leaves_the_capacity_unknown():
    unknown = Estimate(None, note="at some rate no request finished")
    assert capacity_estimate([1, 2], [[0.1, 0.5], [0.1, np.nan]], 0.3) == unknown
    assert capacity_of([1, 2], [0.1, np.nan], 0.3) == (None, unknown.note)
    ratio = ratio_of_capacities(([1, 2], [[0.1, 0.5]] * 2), ([1, 2], [[0.1, np.nan]] * 2), 0.3)
    assert ratio == Estimate(None, note=f"denominator {unknown.note}")
    assert capacity_estimate([1, 2], [[0.1, 0.5]], 0.3) == Estimate(1.5)  # one seed: no interval
    assert ratio_of_capacities(([2, 4], [[0.1, 0.5]]), ([1, 2], [[0.1, 0.5]]), 0.3) == Estimate(2.0)


@pytest.mark.parametrize(
    ("numerator", "message"),
    [
        (([1, 2], [[0.1, 0.5]]), "the same seeds"),
        (([0, 2], [[0.1, 0.5]] * 2), "rates above 0"),
        (([1, 2], [0.1, 0.5]), "by seed and rate"),
        (([1, 2], [[0.1]] * 2), "as many rates"),
    ],
)
def test_a_ratio_of_what_does_not_belong_together_is_refused(numerator, message):
    with pytest.raises(ValueError, match=message):
        ratio_of_capacities(numerator, ([1, 2], [[0.1, 0.5]] * 2), 0.3)


def test_the_same_measurements_give_the_same_interval():
    values = np.cumsum(np.random.default_rng(7).random((5, 6)), axis=1)
    before = capacity_estimate(range(1, 7), values, 1.5)
    assert capacity_estimate(range(1, 7), values, 1.5) == before
    assert before.low < before.value < before.high
