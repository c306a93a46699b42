"""Confidence intervals and their refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from corun.stats.intervals import (
    Estimate,
    Interval,
    minimum_length,
    order_statistic_interval,
    percentile_interval,
    ratio_interval,
    replication_interval,
    t_interval,
)

positive = st.floats(1e-3, 1e3)
runs = st.lists(positive, min_size=2, max_size=8)


def interval_of(estimate: Estimate) -> Interval:
    """Return the interval of an estimate that must have one."""
    assert estimate.interval is not None, estimate.reason
    return estimate.interval


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10))
@settings(max_examples=60)
def test_the_t_interval_is_scipys(values: list[float]) -> None:
    """Mean +- t s / sqrt(k), as scipy computes it, and it holds its point."""
    interval = interval_of(t_interval(values))
    assert interval.contains(interval.point)
    assert interval.k == len(values)
    error = scipy_stats.sem(values)
    assume(error > 1e-9)
    low, high = scipy_stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-6)


@given(runs, st.floats(0.5, 0.9), st.floats(0.01, 0.09))
@settings(max_examples=40)
def test_more_confidence_is_a_wider_interval(values: list[float], level: float, more: float) -> None:
    """Raising the level never narrows the interval."""
    narrow = interval_of(t_interval(values, level=level))
    wide = interval_of(t_interval(values, level=level + more))
    assert wide.low <= narrow.low
    assert wide.high >= narrow.high


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values: list[float]) -> None:
    """With fewer than two runs there is None and a reason, never a number."""
    estimate = t_interval(values)
    assert estimate.interval is None
    assert "at least 2 runs" in estimate.reason


def test_an_unbounded_run_has_no_interval() -> None:
    """A run whose p99 is infinite (lost requests) makes the mean over runs meaningless."""
    assert t_interval([1.0, math.inf]).interval is None


@pytest.mark.parametrize(
    ("percentile", "utilisation", "expected"),
    [(99, 0.8, 4000), (99, 0.9, 16_000), (99, 0.5, 662), (99.9, 0.8, 40_000), (50, 0.8, 800), (50, 0.0, 32)],
)
def test_the_minimum_length_follows_the_stated_formula(percentile: float, utilisation: float, expected: int) -> None:
    """Forty tail requests at utilisation 0.8, scaled by (1 - utilisation)^-2, never below the sample floor."""
    assert minimum_length(percentile, utilisation) == expected


@pytest.mark.parametrize("utilisation", [1.0, 1.2, -0.1, math.nan])
def test_a_saturated_server_has_no_minimum_length(utilisation: float) -> None:
    """No length is long enough without a steady state."""
    with pytest.raises(ValueError, match="utilisation"):
        minimum_length(99, utilisation)


@given(st.floats(1, 99.9), st.floats(0, 0.98), st.floats(0, 0.01))
@settings(max_examples=60)
def test_busier_servers_need_longer_runs(percentile: float, utilisation: float, more: float) -> None:
    """The minimum length never falls as utilisation rises."""
    assert minimum_length(percentile, utilisation) <= minimum_length(percentile, utilisation + more)


def test_the_headline_is_refused_below_five_runs() -> None:
    """Four long runs get a reason that names both numbers."""
    estimate = replication_interval([90.0] * 4, [6000] * 4)
    assert estimate.interval is None
    assert "4 runs" in estimate.reason
    assert "5" in estimate.reason


def test_the_headline_is_refused_for_short_runs_however_many() -> None:
    """Ten runs of 1,000 requests are worse than five of 4,000: the length is what is missing."""
    estimate = replication_interval([90.0 + i for i in range(10)], [1000] * 10)
    assert estimate.interval is None
    assert "1000 requests" in estimate.reason
    assert "4000" in estimate.reason


def test_the_headline_is_refused_when_a_run_lacks_the_percentile() -> None:
    """Dropping the run that could not be measured would bias the rest."""
    estimate = replication_interval([90.0, 91.0, None, 92.0, 93.0], [5000] * 5)
    assert estimate.reason == "1 of 5 runs have no p99"


def test_the_headline_from_raw_samples_is_the_one_from_percentiles() -> None:
    """Raw runs and their percentiles give the same interval."""
    rng = np.random.default_rng(1)
    samples = [rng.exponential(10, 4000) for _ in range(5)]
    values = [float(np.quantile(run, 0.99, method="higher")) for run in samples]
    assert percentile_interval(samples) == replication_interval(values, [4000] * 5)


def test_values_and_lengths_must_match() -> None:
    """One length a run."""
    with pytest.raises(ValueError, match="one of each"):
        replication_interval([1.0], [1, 2])


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8))
@settings(max_examples=60)
def test_swapping_the_sides_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    """interval(a, b) is 1 / interval(b, a), paired or not: no side is privileged."""
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for paired in (True, False):
        try:
            forward = interval_of(ratio_interval(a, b, paired=paired))
            backward = interval_of(ratio_interval(b, a, paired=paired))
        except OverflowError:
            pytest.fail("an interval must not overflow")
        assert forward.point == pytest.approx(1 / backward.point)
        if math.isfinite(forward.high) and math.isfinite(backward.high):
            assert forward.low == pytest.approx(1 / backward.high)
            assert forward.high == pytest.approx(1 / backward.low)


@given(runs, runs, positive)
@settings(max_examples=60)
def test_a_ratio_has_no_unit(baseline: list[float], candidate: list[float], unit: float) -> None:
    """Measuring both sides in another unit changes nothing."""
    assume(len(baseline) > 2 and len(candidate) > 2)
    one = interval_of(ratio_interval(baseline, candidate, paired=False))
    other = interval_of(ratio_interval([v * unit for v in baseline], [v * unit for v in candidate], paired=False))
    assert one.point == pytest.approx(other.point)
    assert one.contains(one.point)


@pytest.mark.parametrize(("baseline", "candidate"), [([1.0], [2.0]), ([], [1.0, 2.0]), ([0.0, 1.0], [1.0, 2.0])])
def test_a_ratio_without_spread_or_sign_is_refused(baseline: list[float], candidate: list[float]) -> None:
    """One run a side, no run, or a zero in the denominator: a reason and no interval."""
    estimate = ratio_interval(baseline, candidate, paired=False)
    assert estimate.interval is None
    assert estimate.reason


def test_pairs_must_pair() -> None:
    """A paired ratio of unequal numbers of runs is a mistake, not a shorter comparison."""
    with pytest.raises(ValueError, match="as many runs on both sides"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


def test_the_paired_ratio_cancels_what_pairs_share() -> None:
    """Runs that differ tenfold among themselves, but by exactly 1.5 within each pair, have the ratio 1.5."""
    baseline = [1.0, 10.0, 3.0, 7.0, 2.0]
    interval = interval_of(ratio_interval(baseline, [1.5 * value for value in baseline], paired=True))
    assert (interval.low, interval.high) == pytest.approx((1.5, 1.5))


@given(st.integers(11, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_order_statistic_interval_is_made_of_samples(n: int, seed: int) -> None:
    """Its bounds are samples (or unbounded), its point is the percentile, and it says what the samples are worth."""
    samples = np.random.default_rng(seed).exponential(1, n)
    interval = interval_of(order_statistic_interval(samples, 50))
    assert {interval.low, interval.high} <= {*samples.tolist(), -math.inf, math.inf}
    assert interval.effective is not None
    assert 1 <= interval.effective <= n + 1e-9
    assert "as if independent" in interval.label


@pytest.mark.parametrize(("n", "percentile"), [(100, 50), (500, 90), (2000, 99)])
def test_the_order_statistic_interval_covers_independent_samples(n: int, percentile: float) -> None:
    """For independent samples the ranks contain the true quantile with at least the stated probability."""
    ordered = np.arange(1.0, n + 1)
    interval = interval_of(order_statistic_interval(ordered, percentile))
    below = scipy_stats.binom(n, percentile / 100)
    assert below.cdf(interval.high - 1) - below.cdf(interval.low - 1) >= 0.95


def test_few_samples_set_no_upper_bound_for_p99() -> None:
    """At 662 samples p99 has an upper rank; at a level those samples cannot support it is infinite, never invented."""
    samples = np.random.default_rng(2).exponential(1, 662)
    assert interval_of(order_statistic_interval(samples, 99, level=0.999)).high == math.inf
    assert order_statistic_interval(samples[:661], 99).interval is None


def test_an_interval_must_hold_its_point() -> None:
    """A point outside its own interval is a programming error."""
    with pytest.raises(ValueError, match="holds its point"):
        Interval(1.0, 2.0, 3.0, "none", 1)


@pytest.mark.parametrize("arguments", [(None, ""), (Interval(1, 1, 1, "none", 1), "why")])
def test_an_estimate_is_an_interval_or_a_reason(arguments: tuple[Interval | None, str]) -> None:
    """Neither both nor none."""
    with pytest.raises(ValueError, match="an interval"):
        Estimate(*arguments)
