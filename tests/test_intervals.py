"""Intervals against scipy's and worked examples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import special, stats
from scipy.stats import binomtest

from peftbench.intervals import MOST_FREEDOM, beta_share, estimate, t_limit, t_p, wilson_interval


def test_wilsons_interval_matches_the_worked_example():
    """8 of 10, worked out by hand: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half width 0.22659."""
    low, high = wilson_interval(8, 10)
    assert (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4)) == (low, high)


@given(n=st.integers(1, 3000), data=st.data())
@hypothesis_settings(deadline=None, max_examples=60)
def test_wilsons_interval_matches_scipy(n, data):
    """For any number of hits, none and all included."""
    hits = data.draw(st.integers(0, n))
    reference = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson_interval(hits, n)
    assert (pytest.approx(reference.low, abs=1e-9), pytest.approx(reference.high, abs=1e-9)) == (low, high)
    assert 0.0 <= low <= hits / n <= high <= 1.0


def test_wilsons_interval_has_the_share_in_it():
    """None and all, too, where rounding alone would leave it out: error bars are not negative."""
    assert all(wilson_interval(n, n)[1] == 1.0 and wilson_interval(0, n)[0] == 0.0 for n in range(1, 3000))


FREEDOM = st.floats(0, math.log(MOST_FREEDOM)).map(math.exp)


@given(t=st.floats(-50, 50), freedom=FREEDOM)
@hypothesis_settings(deadline=None, max_examples=300)
def test_the_p_value_is_that_of_scipys_student(t, freedom):
    """In the middle and far out, of one degree of freedom and of many."""
    assert 2 * stats.t.sf(abs(t), freedom) == pytest.approx(t_p(t, freedom), rel=1e-8, abs=1e-300)


@given(freedom=FREEDOM)
@hypothesis_settings(deadline=None, max_examples=100)
def test_the_limit_is_that_of_scipys_student(freedom):
    """Of 95%, in either direction."""
    assert stats.t.ppf(0.975, freedom) == pytest.approx(t_limit(freedom), rel=1e-9)


@given(x=st.floats(0, 1), a=st.floats(0.5, 3000), b=st.floats(0.5, 3000))
@hypothesis_settings(deadline=None, max_examples=300)
def test_the_share_of_a_beta_distribution_is_that_of_scipy(x, a, b):
    """From both sides of its middle."""
    assert special.betainc(a, b, x) == pytest.approx(beta_share(x, a, b), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize(("t", "p"), [(0.0, 1.0), (1e-200, 1.0), (1e200, 0.0), (math.inf, 0.0)])
def test_a_t_beyond_all_numbers_is_certain(t, p):
    """And one of nothing is nothing."""
    assert p == t_p(t, 7.0)


def test_an_estimate_of_two_sources_is_welchs_t_test():
    """Interval and p of the difference of two means whose variances differ."""
    rng = np.random.default_rng(0)
    base, head = rng.normal(0.0, 1.0, 5), rng.normal(1.0, 3.0, 9)
    found = estimate(head.mean() - base.mean(), [(side.var(ddof=1) / len(side), len(side) - 1) for side in (base, head)])
    expected = stats.ttest_ind(head, base, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (pytest.approx(expected.pvalue), pytest.approx((interval.low, interval.high))) == (found.p, found.ci95)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.1, 0.0)])
def test_an_estimate_without_variance_is_certain(value, p):
    """Of nothing, and of something."""
    found = estimate(value, [(0.0, math.inf)])
    assert ((value, value), p) == (found.ci95, found.p)


def test_a_source_that_is_nothing_needs_no_degrees_of_freedom():
    """The variance over one example is none, and so is what is left to tell it by."""
    assert estimate(0.5, [(0.1, 1.0)]) == estimate(0.5, [(0.0, 0.0), (0.1, 1.0)])


@given(value=st.floats(-4, 4), freedom=st.floats(1, 1e6), exact_p=st.none() | st.floats(0, 1), level=st.sampled_from([0.01, 0.05]))
def test_what_an_estimate_shows_is_what_its_p_says(value, freedom, exact_p, level):
    """Of Student's test and of a better one, at any level up to 5%."""
    found = estimate(value, [(1.0, freedom)], exact_p=exact_p)
    assert found.shows(level) == (found.p < level)
