"""Autocorrelation and the effective number of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.stats.correlation import autocorrelation, effective_size
from corun.stats.queues import poisson_arrivals, sojourn_times

series = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=1, max_size=120)


@given(series)
@settings(max_examples=60)
def test_the_fft_gives_the_defining_sum(samples: list[float]) -> None:
    """r[k] is the lagged product sum over the sum of squares (biased estimator), r[0] = 1, |r| <= 1."""
    values = np.array(samples)
    centred = values - values.mean()
    correlations = autocorrelation(values)
    assert correlations[0] == pytest.approx(1)
    if values.max() > values.min():
        n = values.size
        expected = [centred[: n - lag] @ centred[lag:] / (centred @ centred) for lag in range(n)]
        assert correlations == pytest.approx(expected, abs=1e-6)


@given(series)
@settings(max_examples=60)
def test_the_effective_size_lies_between_one_and_n(samples: list[float]) -> None:
    """Correlation never creates samples, and there is always at least one."""
    assert 1 - 1e-9 <= effective_size(samples) <= len(samples)
    assert 1 - 1e-9 <= effective_size(samples, 50) <= len(samples)


def test_independent_samples_keep_their_number() -> None:
    """White noise of n samples is worth about n."""
    samples = np.random.default_rng(3).normal(size=20_000)
    assert effective_size(samples) > 15_000


def test_a_first_order_process_has_the_textbook_size() -> None:
    """An AR(1) series with coefficient a is worth n (1 - a) / (1 + a)."""
    rng, a, n = np.random.default_rng(4), 0.8, 50_000
    noise = rng.normal(size=n)
    samples = np.empty(n)
    samples[0] = noise[0]
    for i in range(1, n):
        samples[i] = a * samples[i - 1] + noise[i]
    assert effective_size(samples) == pytest.approx(n * (1 - a) / (1 + a), rel=0.25)


def test_a_queue_is_worth_a_small_share_of_its_requests() -> None:
    """At utilisation 0.8, 20,000 requests tell p99 no better than a few hundred independent ones would."""
    arrivals = poisson_arrivals(np.random.default_rng(5), 0.1, 20_000)
    assert effective_size(sojourn_times(arrivals, 8.0), 99) < 2000


def test_no_samples_have_no_correlation() -> None:
    """An empty series is refused."""
    with pytest.raises(ValueError, match="no samples"):
        autocorrelation([])
