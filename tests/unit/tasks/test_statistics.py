"""What is counted of a task, and how counts are put together."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.tasks.statistics import Statistics

TIMES = st.lists(st.floats(0.001, 1e5), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(TIMES, max_size=5))
def test_parts_recorded_one_by_one_are_the_whole(parts: list[list[float]]) -> None:
    """Merging the statistics of parts gives those of all their requests together."""
    total = sum((Statistics.of(part, cpu_s=1.0, span_s=2.0) for part in parts), Statistics())
    values = [value for part in parts for value in part]
    assert total.requests == len(values)
    assert total.cpu_s == len(parts)
    if values:
        assert total.mean_ms == pytest.approx(statistics.fmean(values), rel=1e-9)
        assert total.max_ms == max(values)
    if len(values) > 1:
        assert total.sd_ms == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6 * max(values))


def test_what_was_not_measured_stays_missing() -> None:
    """None is neither 0 nor contagious: memory is the largest seen, GPU time the sum of what is known."""
    unknown, known = Statistics(requests=1, mean_ms=5), Statistics(rss_mib=10.0, gpu_s=2.0)
    assert (unknown + unknown).rss_mib is None
    assert (unknown + known).rss_mib == 10.0
    assert (known + known).gpu_s == 4.0
    assert Statistics().rate is None
    assert Statistics(requests=3, errors=1, span_s=2.0).rate == 2.0
