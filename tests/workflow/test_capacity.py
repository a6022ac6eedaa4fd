import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.capacity import first_upward_crossing, is_monotone, largest_fall

VALUES = st.lists(st.floats(0, 10), min_size=1, max_size=12)
BOUNDS = st.floats(0.01, 10)


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
