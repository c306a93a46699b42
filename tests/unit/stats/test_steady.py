"""Warm-up, stability and over-saturation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from corun.stats.queues import poisson_arrivals, sojourn_times
from corun.stats.steady import (
    NEVER,
    mser5,
    over_saturation,
    slope_test,
    steady_state,
    three_windows,
)

SERVICE_NS = 8e6
SECOND = 1_000_000_000


def queue(utilisation: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (start_ns, end_ns) of n requests to an 8 ms M/D/1 server."""
    arrivals = poisson_arrivals(np.random.default_rng(seed), utilisation / SERVICE_NS, n)
    ends = arrivals + sojourn_times(arrivals, SERVICE_NS)
    return arrivals.astype(np.int64), ends.astype(np.int64)


def mser_by_definition(values: np.ndarray) -> list[float]:
    """Return White's squared error after dropping each number of batches that may be dropped."""
    means = values[: values.size // 5 * 5].reshape(-1, 5).mean(axis=1)
    return [((means[d:] - means[d:].mean()) ** 2).sum() / (means.size - d) ** 2 for d in range(means.size // 2 + 1)]


@given(st.integers(50, 300), st.integers(0, 2**32 - 1), st.floats(0, 50))
@settings(max_examples=50)
def test_mser5_minimises_the_definition(n: int, seed: int, transient: float) -> None:
    """The cumulative-sum form finds the batch that minimises White's formula."""
    values = np.random.default_rng(seed).normal(10, 1, n) + transient * np.exp(-np.arange(n) / 20)
    truncation = mser5(values)
    assert truncation is not None
    errors = mser_by_definition(values)
    assert truncation.dropped % 5 == 0
    assert errors[truncation.dropped // 5] <= min(errors) * (1 + 1e-9)
    assert truncation.dropped <= n / 2


def test_mser5_drops_a_cold_start_and_little_of_a_level_run() -> None:
    """A 100-sample transient of ten times the latency goes; a run without one loses next to nothing."""
    rng = np.random.default_rng(1)
    level = rng.normal(10, 1, 2000)
    cold = level.copy()
    cold[:100] += 90
    warm_up, none = mser5(cold), mser5(level)
    assert warm_up is not None
    assert none is not None
    assert 100 <= warm_up.dropped <= 200
    assert warm_up.ended
    assert none.dropped <= 600


def test_mser5_says_when_the_warm_up_never_ends() -> None:
    """A latency that falls through the whole run has no steady part."""
    truncation = mser5(np.linspace(100, 0, 1000))
    assert truncation is not None
    assert not truncation.ended


def test_mser5_needs_ten_batches() -> None:
    """Below fifty samples there is no answer."""
    assert mser5(np.ones(49)) is None
    assert mser5(np.ones(50)) is not None


@given(st.integers(60, 300), st.floats(1, 1e6), st.integers(0, 10))
@settings(max_examples=40)
def test_mser5_does_not_depend_on_unit_or_level(n: int, shift: float, power: int) -> None:
    """Latency in ns or ms, with or without a constant on top: the same truncation."""
    values = np.random.default_rng(n).exponential(1, n)
    one, other = mser5(values), mser5(values * 2.0**power)
    assert one == other
    assert one is not None
    assert mser5(values + shift) == one


def test_three_level_windows_are_stable() -> None:
    """Constant rate and latency: all ratios are 1."""
    ends = np.arange(300) * 10_000_000
    stability = three_windows(ends, np.full(300, 8e6), 0, 3 * SECOND)
    assert stability.stable
    assert stability.throughput_per_s == (100.0, 100.0, 100.0)
    assert stability.p50_ns == (8e6, 8e6, 8e6)


@pytest.mark.parametrize(("last", "stable"), [(109, True), (112, False)])
def test_ten_per_cent_is_the_limit_for_throughput(last: int, stable: bool) -> None:
    """max / min of replies a window may reach 1.10 and not more."""
    counts = (100, 100, last)
    ends = np.concatenate([i * SECOND + np.arange(c) * (SECOND // c) for i, c in enumerate(counts)])
    result = three_windows(ends, np.full(ends.size, 8e6), 0, 3 * SECOND)
    assert result.stable is stable
    assert result.throughput_ratio == pytest.approx(last / 100)


@pytest.mark.parametrize(("last", "stable"), [(8.7e6, True), (8.9e6, False)])
def test_ten_per_cent_is_the_limit_for_p50(last: float, stable: bool) -> None:
    """max / min of the median latency may reach 1.10 and not more; a few outliers do not matter."""
    ends = np.arange(300) * 10_000_000
    sojourns = np.where(np.arange(300) < 200, 8e6, last)
    sojourns[::10] = 1e9
    assert three_windows(ends, sojourns, 0, 3 * SECOND).stable is stable


def test_a_window_without_replies_is_not_stable() -> None:
    """Silence is infinitely far from level, and no division by zero."""
    stability = three_windows([1, 2], [5.0, 5.0], 0, 3 * SECOND)
    assert stability.throughput_ratio == math.inf
    assert not stability.stable


def test_replies_outside_the_range_do_not_count() -> None:
    """The range is half open: a reply at its end belongs to the next one."""
    stability = three_windows([0, SECOND, 2 * SECOND, 3 * SECOND], [1.0] * 4, 0, 3 * SECOND)
    assert stability.throughput_per_s == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("arguments", [([1], [1.0], 5, 5), ([1, 2], [1.0], 0, 5)])
def test_impossible_windows_are_refused(arguments: tuple[list[int], list[float], int, int]) -> None:
    """An empty range, or replies without latencies, is a mistake of the caller."""
    with pytest.raises(ValueError, match=r"window|latencies"):
        three_windows(*arguments)


def exact_regression(values: list[float]) -> tuple[float, float]:
    """Return the least-squares slope over 0, 1, 2, ... and its standard error, from exact fractions."""
    data, n = [Fraction(value) for value in values], len(values)
    steps = [Fraction(2 * i - n + 1, 2) for i in range(n)]
    power, mean = sum(step * step for step in steps), sum(data) / n
    slope = sum(step * value for step, value in zip(steps, data, strict=True)) / power
    rest = sum((value - mean - slope * step) ** 2 for step, value in zip(steps, data, strict=True))
    return float(slope), math.sqrt(rest / (n - 2) / power)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20))
@example([-100.0, 0.0, 99.999998])
@example([1e-7, 0.0, -100.0, 100.0])
@settings(max_examples=60)
def test_the_slope_test_is_the_regression(values: list[float]) -> None:
    """Least-squares slope and one-sided p of its t are those of exact arithmetic, near-collinear values included."""
    slope, p = slope_test(values)
    expected, error = exact_regression(values)
    assert slope == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if error > 1e-5:
        assert p == pytest.approx(float(scipy_stats.t.sf(expected / error, len(values) - 2)), rel=1e-5, abs=1e-12)
    assert 0 <= p <= 1


@given(st.lists(st.integers(-100, 100), min_size=3, max_size=20))
@settings(max_examples=40)
def test_the_slope_test_is_scipys_regression(values: list[int]) -> None:
    """On whole numbers, where scipy's correlation loses nothing, slope and p are those of scipy.stats.linregress."""
    slope, p = slope_test(values)
    expected = scipy_stats.linregress(np.arange(len(values)), values, alternative="greater")
    assert slope == pytest.approx(expected.slope, rel=1e-9, abs=1e-12)
    if expected.stderr > 1e-3:
        assert p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_a_straight_line_is_certain() -> None:
    """Without any scatter the slope's sign is known."""
    assert slope_test([1.0, 2.0, 3.0, 4.0]) == (1.0, 0.0)
    assert slope_test([2.0, 2.0, 2.0]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least 3"):
        slope_test([1.0, 2.0])


@pytest.mark.parametrize(("utilisation", "least", "most"), [(0.5, 0, 0.02), (0.8, 0, 0.03), (1.1, 0.98, 1)])
def test_over_saturation_is_found_and_seldom_imagined(utilisation: float, least: float, most: float) -> None:
    """Of 150 queues of 4,000 requests: nearly none below capacity, nearly all 10 % above it."""
    found = 0
    for seed in range(150):
        saturation = over_saturation(*queue(utilisation, 4000, seed))
        assert saturation is not None
        found += saturation.saturated
    assert least <= found / 150 <= most


def test_unanswered_requests_count_as_in_flight() -> None:
    """A server that answers half of its requests and loses the rest grows without bound."""
    starts, ends = queue(0.4, 2000, 1)
    ends[::2] = NEVER
    saturation = over_saturation(starts, ends)
    assert saturation is not None
    assert saturation.saturated
    assert saturation.growth == pytest.approx(1000, rel=0.1)


def test_the_growth_rate_is_the_excess_arrival_rate() -> None:
    """At twice the capacity of 125/s, requests in flight grow by 125 a second."""
    saturation = over_saturation(*queue(2.0, 20_000, 3))
    assert saturation is not None
    assert saturation.slope_per_s == pytest.approx(125, rel=0.05)


def test_too_few_requests_have_no_trend() -> None:
    """Below a hundred requests, or with all of them at one instant, the answer is None."""
    assert over_saturation(np.arange(99), np.arange(99) + 5) is None
    assert over_saturation(np.zeros(200), np.ones(200)) is None
    with pytest.raises(ValueError, match="starts"):
        over_saturation([1, 2], [1])


def test_a_light_service_is_steady() -> None:
    """An evenly loaded service passes every check, in whatever order its records come."""
    starts = np.arange(2000) * 20_000_000
    order = np.random.default_rng(0).permutation(2000)
    report = steady_state(starts[order], (starts + 8_000_000)[order])
    assert report.steady
    assert report.problems == ()
    assert report.warm_up is not None
    assert report.warm_up.dropped == 0


def test_an_over_saturated_run_is_named_first() -> None:
    """The report says that no percentile is quoted and what to do."""
    report = steady_state(*queue(1.2, 3000, 5))
    assert not report.steady
    assert report.problems[0].startswith("over-saturated")
    assert "lower the rate" in report.problems[0]


def test_a_slow_drift_is_a_problem() -> None:
    """Latency that doubles over the run has a trend and fails the three windows although the server keeps up."""
    starts = np.arange(3000) * 50_000_000
    report = steady_state(starts, starts + np.linspace(8e6, 16e6, 3000).astype(np.int64))
    assert any(problem.startswith("drifting") for problem in report.problems)
    assert report.notes == ()


def test_a_stationary_queue_is_seldom_a_problem() -> None:
    """At utilisation 0.8 most runs fail the three-window rule by chance: a note, and a problem in few per cent."""
    reports = [steady_state(*queue(0.8, 4000, seed)) for seed in range(150)]
    assert np.mean([report.steady for report in reports]) >= 0.93
    assert np.mean([bool(report.notes) for report in reports]) > 0.5


@pytest.mark.parametrize("n", [0, 1, 40, 99])
def test_a_short_run_says_that_it_is_short(n: int) -> None:
    """No check is passed by having no data."""
    starts = np.arange(n) * SECOND
    report = steady_state(starts, starts + 1)
    assert not report.steady
    assert "too few requests" in report.problems[0]


def test_lost_requests_do_not_spoil_the_latency_checks() -> None:
    """A handful of lost requests has no latency; the rest is judged as usual."""
    starts = np.arange(2000) * 20_000_000
    ends = starts + 8_000_000
    ends[100::200] = NEVER
    report = steady_state(starts, ends)
    assert report.steady
    assert report.stability is not None
    assert max(report.stability.p50_ns) == 8e6
    assert report.warm_up is not None
    assert report.warm_up.samples == 1990
