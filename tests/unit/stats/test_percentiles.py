"""Exact percentiles and their sample floors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from corun.stats.percentiles import (
    FLOORS,
    METHOD,
    PERCENTILES,
    percentile_of,
    percentiles_of,
    sample_floor,
    summarise,
)

latencies = st.lists(st.floats(0, 1e6), min_size=0, max_size=200)


def test_floors_are_those_of_the_published_table() -> None:
    """The five floors are LoadGen's minimum query counts."""
    assert dict(FLOORS) == {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_floor_is_the_smallest_count_that_satisfies_the_formula(percentile: float) -> None:
    """P[Binomial(n, 1 - p) <= 1] <= 0.01 holds at the floor and not one sample below it."""
    floor, tail = sample_floor(percentile), 1 - percentile / 100
    assert scipy_stats.binom.cdf(1, floor, tail) <= 0.01
    assert scipy_stats.binom.cdf(1, floor - 1, tail) > 0.01


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_a_percentile_below_its_floor_is_none(percentile: float) -> None:
    """At the floor a percentile is quoted; with one sample fewer it is None, never a number."""
    samples = np.arange(sample_floor(percentile), dtype=float)
    assert percentile_of(samples, percentile) is not None
    assert percentile_of(samples[1:], percentile) is None


def test_the_rank_is_exact_where_binary_fractions_round() -> None:
    """p99.9 of 0..7000 is sample 6993: 99.9 / 100 in binary must not push the rank up by one."""
    assert percentile_of(np.arange(7001.0), 99.9) == 6993.0
    assert percentile_of(np.arange(1001.0), 99) == 990.0


def test_an_unbounded_wait_ranks_above_everything_else() -> None:
    """A lost request counts as infinite latency and leaves the percentiles below it finite."""
    samples = np.concatenate([np.ones(990), np.full(10, math.inf)])
    summary = summarise(samples)
    assert summary.p95 == 1.0
    assert summary.p99 == math.inf
    assert summary.maximum == math.inf


@given(latencies)
@settings(max_examples=60)
def test_percentiles_are_samples_and_never_decrease(samples: list[float]) -> None:
    """Each quoted percentile is one of the samples, and a higher percentile is never smaller."""
    quoted = [value for value in percentiles_of(samples) if value is not None]
    assert set(quoted) <= set(samples)
    assert quoted == sorted(quoted)


@given(st.lists(st.floats(0, 1e6), min_size=11, max_size=200), st.integers(1, 10))
@settings(max_examples=60)
def test_percentiles_scale_with_the_unit_and_ignore_order(samples: list[float], power: int) -> None:
    """A change of unit (by a power of two, so without rounding) scales them; the order of samples is irrelevant."""
    scaled = [value * 2.0**power for value in reversed(samples)]
    expected = tuple(None if value is None else value * 2.0**power for value in percentiles_of(samples))
    assert percentiles_of(scaled) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=11, max_size=300))
@settings(max_examples=40)
def test_percentiles_agree_with_numpy(samples: list[float]) -> None:
    """The declared method is numpy's method of that name."""
    assert percentile_of(samples, 50) == np.percentile(samples, 50, method=METHOD)


@given(latencies)
@settings(max_examples=40)
def test_a_summary_is_ordered_and_counts_every_sample(samples: list[float]) -> None:
    """n is the number of samples; no percentile exceeds the maximum; an empty set has no value, not zero."""
    summary = summarise(samples)
    assert summary.n == len(samples)
    if not samples:
        assert summary.maximum is None
        assert summary.mean is None
        return
    assert summary.maximum == max(samples)
    assert summary.p50 is None or summary.p50 <= summary.maximum


@pytest.mark.parametrize("bad", [[1.0, math.nan], [[1.0, 2.0]]])
def test_nan_and_tables_are_refused(bad: object) -> None:
    """A NaN or a two-dimensional array is a caller's mistake, said in a sentence."""
    with pytest.raises(ValueError, match=r"NaN|one-dimensional"):
        summarise(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("percentile", [0, 100, -1, 101])
def test_a_percentile_lies_strictly_between_0_and_100(percentile: float) -> None:
    """The minimum and maximum are not percentiles here."""
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile_of([1.0], percentile)
