"""The rules of docs/verdicts.md, case by case."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from harness.analysis.intervals import Estimate
from harness.analysis.verdicts import q_values, retained_effect, verdict, widened

NUMBERS = st.floats(0.05, 50)


def found(value, low, high, sample_low=None, sample_high=None, p_value=0.001):
    """An estimate; a sample's interval is the value's if not given."""
    return Estimate(value, low, high, "", sample_low or low, sample_high or high, p_value)


def judge(paper, estimate, relation="equal", is_comparison=True, q_value=0.001, retest_spread=0.15):
    paper = paper if isinstance(paper, tuple) else (paper, paper)
    return verdict(paper, relation, estimate, is_comparison=is_comparison, q_value=q_value, retest_spread=retest_spread)


def test_a_fifth_of_an_effect_is_its_direction_only():
    """1.21 for 2.24 retains 24 % of the effect."""
    assert retained_effect(1.21, (2.24, 2.24), "equal", True) == pytest.approx(0.236, abs=0.001)
    assert judge(2.24, found(1.21, 1.15, 1.27)) == "direction only"


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (found(1.90, 1.85, 1.95), "consistent"),  # 1.95 times e to the 0.15 is 2.27
        (found(1.45, 1.40, 1.50, 1.00, 1.95), "consistent"),  # one sample may be 1.95
        (found(1.70, 1.65, 1.75), "attenuated"),
        (found(1.50, 1.45, 1.55), "attenuated"),  # retains half of it: ln 1.5 / ln 2.24
        (found(1.49, 1.45, 1.55), "direction only"),
        (found(3.20, 3.10, 3.30), "inflated"),
        (found(3.40, 3.30, 3.50), "direction only"),
        (found(0.80, 0.75, 0.85), "contradicted"),
        (found(None, 1.10, math.inf, 1.05, math.inf), "consistent"),  # at least 1.1: what is claimed may be so
        (found(None, 3.10, math.inf, 3.00, math.inf), "direction only"),
        (found(None, 0.00, 0.90, 0.00001, 0.95), "contradicted"),
    ],
)
def test_a_gain_of_224(estimate, expected):
    assert judge(2.24, estimate) == expected


def test_an_effect_that_is_not_shown_contradicts():
    estimate = found(1.3, 0.98, 1.7)
    assert judge(3, estimate, q_value=0.06) == "contradicted"
    assert judge(3, found(1.3, 1.02, 1.7), q_value=0.06) == "contradicted"  # not after the adjustment
    assert judge(3, found(1.3, 1.02, 1.7), q_value=0.05) == "direction only"


def test_no_sample_is_consistent_if_the_opposite_is_shown():
    assert judge(1.05, found(0.95, 0.92, 0.98)) == "contradicted"
    assert judge(1.05, found(0.95, 0.92, 1.02), q_value=0.2) == "consistent"


def test_over_vllm_the_authors_spread_is_wider():
    estimate = found(1.90, 1.85, 1.95)
    assert judge(2.3, estimate) == "attenuated"
    assert judge(2.3, estimate, retest_spread=0.2) == "consistent"


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (found(2.2, 2.0, 2.3), "consistent"),
        (found(1.3, 1.2, 1.4), "attenuated"),
        (found(3.4, 3.2, 3.6), "inflated"),
        (found(1.1, 1.0, 1.2), "contradicted"),
        (found(4.0, 3.9, 4.1), "contradicted"),
        (found(None, 8.0, math.inf), "contradicted"),
        (Estimate(2.41), "untestable"),
    ],
)
def test_a_load_of_241(estimate, expected):
    assert judge(2.41, estimate, is_comparison=False, q_value=None) == expected


def test_ranges_and_bounds():
    assert judge((1.4, 1.8), found(1.6, 1.5, 1.7)) == "consistent"
    assert judge((1.4, 1.8), found(1.25, 1.22, 1.28)) == "consistent"  # 1.28 times e to the 0.15 is 1.49
    assert judge((1.4, 1.8), found(1.18, 1.16, 1.2)) == "direction only"
    assert judge(5, found(16.9, 14.0, 20.0), "at_most", is_comparison=False) == "contradicted"
    assert judge(5, found(7.0, 6.5, 7.5), "at_most", is_comparison=False) == "inflated"
    assert judge(5, found(5.6, 5.4, 5.8), "at_most", is_comparison=False) == "consistent"
    assert judge(5, found(0.0, 0.0, 0.0), "at_most", is_comparison=False) == "consistent"
    assert retained_effect(1.6, (1.4, 1.8), "equal", True) == 1
    assert retained_effect(7.0, (5, 5), "at_most", False) == 1.4
    assert retained_effect(3.0, (5, 5), "at_most", False) == 1
    assert retained_effect(1.2, (0.9, 1.0), "equal", True) is None
    assert retained_effect(None, (2, 2), "equal", True) is None


@given(value=NUMBERS, claim=NUMBERS, wide=st.floats(0, 1))
def test_the_inverse_of_a_comparison_has_the_same_verdict(value, claim, wide):
    """Twice as fast and half as slow are the same claim."""
    low, high = value * math.exp(-wide), value * math.exp(wide)
    if min(abs(math.log(side)) for side in (low, high, claim)) < 1e-6:
        return
    one = judge(claim, found(value, low, high))
    assert one == judge(1 / claim, found(1 / value, 1 / high, 1 / low))
    retained = retained_effect(value, (claim, claim), "equal", True)
    assert retained == pytest.approx(retained_effect(1 / value, (1 / claim, 1 / claim), "equal", True))


def test_q_values_are_of_the_family_and_leave_gaps():
    p_values = [0.01, None, 0.04, 0.03, None, 0.5]
    given_ = [0.01, 0.04, 0.03, 0.5]
    found_ = q_values(p_values)
    assert (found_[1], found_[4]) == (None, None)
    assert [found_[i] for i in (0, 2, 3, 5)] == pytest.approx(false_discovery_control(given_))
    assert found_[0] == pytest.approx(0.04)  # four times 0.01
    assert q_values([]) == []
    assert q_values([None]) == [None]


def test_an_interval_is_widened_on_both_sides():
    assert widened(1, 2, math.log(2)) == pytest.approx((0.5, 4))
    assert widened(-1, 0, math.log(2)) == pytest.approx((-2, 0))
    assert widened(0, math.inf, 0.15) == (0, math.inf)
