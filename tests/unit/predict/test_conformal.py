"""Intervals: they cover what they promise where rows are exchangeable, and in the long run where they drift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.predict.conformal import adaptive, conformal_quantile, offsets


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_the_conformal_quantile_is_one_of_the_scores_with_enough_below(values: list[float], level: float) -> None:
    """At least ceil(level (n + 1)) of the scores are no larger, or it is the largest."""
    scores = np.array(values)
    bound = conformal_quantile(scores, level)
    assert bound in scores
    assert (scores <= bound).sum() >= min(np.ceil(level * (scores.size + 1)), scores.size)


@pytest.mark.parametrize("interval", [0.5, 0.8, 0.9])
def test_split_conformal_covers_exchangeable_rows(interval: float) -> None:
    """Skewed errors and ends that are far off: after the offsets the coverage is the nominal one."""
    rng = np.random.default_rng(0)
    actual = rng.gamma(2.0, 1.0, 6000)
    low, high = np.full(6000, 1.5), np.full(6000, 1.6)
    below, above = offsets(low[:3000], high[:3000], actual[:3000], interval)
    inside = (low[3000:] - below <= actual[3000:]) & (actual[3000:] <= high[3000:] + above)
    assert inside.mean() == pytest.approx(interval, abs=0.03)


@pytest.mark.parametrize("drift", [0.0, 2.0, 4.0])
def test_the_adaptive_interval_keeps_its_coverage_under_drift(drift: float) -> None:
    """The level of the values climbs by several deviations; the split interval fails, the adaptive one does not."""
    rng = np.random.default_rng(1)
    calm, moving = rng.normal(size=500), rng.normal(size=4000) + np.linspace(0, drift, 4000)
    history = (-calm, calm)
    zeros = np.zeros(4000)
    low, high = adaptive(zeros, zeros, moving, history, 0.9)
    assert ((low <= moving) & (moving <= high)).mean() == pytest.approx(0.9, abs=0.02)
    if drift >= 2:
        below, above = offsets(np.zeros(500), np.zeros(500), calm, 0.9)
        assert ((-below <= moving) & (moving <= above)).mean() < 0.8


def test_an_adaptive_interval_is_made_before_its_value_is_seen() -> None:
    """Changing a value changes no interval up to and including its own row."""
    rng = np.random.default_rng(2)
    values, history = rng.normal(size=50), (rng.normal(size=30), rng.normal(size=30))
    other = values.copy()
    other[20] = 100.0
    first, second = (adaptive(np.zeros(50), np.zeros(50), one, history, 0.9) for one in (values, other))
    for before, after in zip(first, second, strict=True):
        assert np.array_equal(before[:21], after[:21])
    assert not np.array_equal(first[1][21:], second[1][21:])
