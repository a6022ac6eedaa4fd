import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.arrivals import Arrivals, parse_arrivals

SPECS = ["poisson", "gamma:cv=4", "gamma:cv=0.25", "constant"]


def times(spec, n, rate, seed=0):
    return parse_arrivals(spec).arrival_times(n, rate, np.random.default_rng(seed))


def test_parse_gives_kind_and_cv():
    assert parse_arrivals("poisson") == Arrivals("poisson")
    assert parse_arrivals(" gamma:cv=4 ") == Arrivals("gamma", 4.0)


@pytest.mark.parametrize("spec", [*SPECS, "trace"])
def test_str_is_the_specification(spec):
    assert str(parse_arrivals(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform", "unknown arrivals 'uniform'; valid: poisson, gamma:cv=4, constant, trace"),
        ("gamma", "give cv"),
        ("gamma:cv=0", "give cv"),
        ("gamma:cv=-1", "give cv"),
        ("gamma:cv=nan", "cv must be a finite number, not 'nan'"),
        ("gamma:cv=big", "cv must be a finite number, not 'big'"),
        ("gamma:shape=2", "unknown option 'shape=2'; valid options as key=value: cv"),
        ("gamma:cv=1,cv=2", "'cv' is given twice"),
        ("poisson:cv=2", "valid options as key=value: none"),
    ],
)
def test_bad_specification_names_itself_and_what_is_valid(spec, message):
    with pytest.raises(ConfigError) as caught:
        parse_arrivals(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, None])
@pytest.mark.parametrize("spec", SPECS)
def test_rate_must_be_finite_and_positive(spec, rate):
    with pytest.raises(ConfigError, match="rate"):
        times(spec, 3, rate)


def test_at_least_one_request():
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        times("poisson", 0, 1.0)


@pytest.mark.parametrize(("spec", "cv"), [("poisson", 1.0), ("gamma:cv=4", 4.0), ("gamma:cv=0.5", 0.5)])
def test_gaps_have_the_mean_and_the_variation_asked_for(spec, cv):
    gaps = np.diff(times(spec, 400_000, 2.5), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 2.5, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_gamma_with_cv_1_is_poisson_in_distribution():
    gaps = np.diff(times("gamma:cv=1", 200_000, 1.0), prepend=0.0)
    assert (gaps > 1).mean() == pytest.approx(math.exp(-1), rel=0.02)


def test_constant_is_an_absolute_schedule():
    # i / rate exactly: gaps added up would drift.
    assert times("constant", 1000, 3.0).tolist() == [i / 3.0 for i in range(1, 1001)]


@given(spec=st.sampled_from(SPECS), seed=st.integers(0, 2**32), rate=st.floats(1e-3, 1e4), n=st.integers(1, 200))
def test_one_pattern_for_each_seed_at_every_rate_and_length(spec, seed, rate, n):
    at_rate = times(spec, n, rate, seed)
    assert len(at_rate) == n
    assert at_rate[0] >= 0
    assert (np.diff(at_rate) >= 0).all()
    np.testing.assert_array_equal(at_rate, times(spec, n, rate, seed))
    np.testing.assert_allclose(at_rate * rate, times(spec, n, 1.0, seed), rtol=1e-12)
    np.testing.assert_array_equal(at_rate, times(spec, n + 50, rate, seed)[:n])


def test_seeds_differ():
    assert times("poisson", 5, 1.0, seed=1).tolist() != times("poisson", 5, 1.0, seed=2).tolist()


class TestTrace:
    stamps = np.array([100.0, 100.5, 102.0, 104.0])

    def replay(self, n, rate, stamps=stamps):
        return Arrivals("trace").arrival_times(n, rate, np.random.default_rng(0), stamps, trace="trace 'x'").tolist()

    def test_own_times_from_zero(self):
        assert self.replay(4, None) == [0, 0.5, 2, 4]
        assert self.replay(2, None) == [0, 0.5]

    def test_rate_scales_the_mean_gap(self):
        assert self.replay(4, 3.0) == pytest.approx([0, 0.125, 0.5, 1.0])

    def test_one_request_needs_no_scale(self):
        assert self.replay(1, 2.0) == [0]

    def test_errors(self):
        with pytest.raises(TraceError, match="trace 'x' has no timestamps"):
            self.replay(2, None, None)
        with pytest.raises(TraceError, match="holds 4 requests, fewer than the 5"):
            self.replay(5, None)
        with pytest.raises(TraceError, match="at one instant"):
            self.replay(2, 1.0, np.array([3.0, 3.0]))
        with pytest.raises(ConfigError, match="not -1"):
            self.replay(2, -1)
