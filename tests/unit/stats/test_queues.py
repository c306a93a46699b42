"""The vectorised FIFO queue."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.stats.queues import mean_in_flight, poisson_arrivals, sojourn_times, waiting_times

jobs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=60)


def replay(arrivals: list[float], service: list[float]) -> list[float]:
    """Return waiting times by stepping through the queue one request at a time."""
    free, waits = 0.0, []
    for instant, duration in zip(arrivals, service, strict=True):
        start = max(instant, free)
        waits.append(start - instant)
        free = start + duration
    return waits


@given(jobs)
@settings(max_examples=80)
def test_the_closed_form_is_the_recursion(work: list[tuple[int, int]]) -> None:
    """The running-minimum solution gives exactly what stepping through the queue gives."""
    arrivals = np.cumsum([gap for gap, _ in work]).astype(float)
    service = [float(duration) for _, duration in work]
    assert waiting_times(arrivals, service).tolist() == replay(arrivals.tolist(), service)


@given(jobs)
@settings(max_examples=40)
def test_rows_are_independent_queues(work: list[tuple[int, int]]) -> None:
    """A row of a batch gives what it gives alone."""
    arrivals = np.cumsum([gap for gap, _ in work]).astype(float)
    service = np.array([float(duration) for _, duration in work])
    batch = sojourn_times(np.stack([arrivals, arrivals * 2]), np.stack([service, service]))
    assert batch[0].tolist() == sojourn_times(arrivals, service).tolist()
    assert batch[1].tolist() == sojourn_times(arrivals * 2, service).tolist()


def test_mean_wait_is_pollaczek_khinchine() -> None:
    """The mean wait of M/D/1 is rho S / (2 (1 - rho)): 16 ms at 8 ms service and utilisation 0.8."""
    arrivals = poisson_arrivals(np.random.default_rng(7), 100.0, (4, 400_000))
    waits = waiting_times(arrivals, 0.008)
    assert waits.mean() == pytest.approx(0.016, rel=0.03)


def test_evenly_spaced_arrivals_never_wait() -> None:
    """A constant stream below capacity has no queue: bursts, not load, make waiting."""
    assert waiting_times(np.arange(100) * 10.0, 8.0).max() == 0.0


@pytest.mark.parametrize(("arrivals", "service"), [([1.0, 0.0], 1.0), ([0.0, 1.0], -1.0)])
def test_impossible_inputs_are_refused(arrivals: list[float], service: float) -> None:
    """Time does not run backwards, neither in arrivals nor in service."""
    with pytest.raises(ValueError, match=r"sort|negative"):
        waiting_times(arrivals, service)


def test_a_poisson_process_needs_a_positive_rate() -> None:
    """A rate of zero would be an endless wait for the first arrival."""
    with pytest.raises(ValueError, match="positive"):
        poisson_arrivals(np.random.default_rng(0), 0.0, 3)


@given(jobs)
@settings(max_examples=60)
def test_mean_in_flight_is_the_overlap_with_the_window(work: list[tuple[int, int]]) -> None:
    """The level of a window is the total time requests spend inside it, by its width, whatever their order."""
    starts = np.array([start for start, _ in work])
    ends = starts + np.array([duration for _, duration in work])
    edges = [0, 7, 20, 50, 101]
    expected = [
        np.clip(np.minimum(ends, b) - np.maximum(starts, a), 0, None).sum() / (b - a) for a, b in pairwise(edges)
    ]
    assert mean_in_flight(starts[::-1], ends, edges) == pytest.approx(expected)


def test_mean_in_flight_obeys_littles_law() -> None:
    """Requests in flight = arrival rate x mean sojourn (Little 1961), over a long run."""
    arrivals = poisson_arrivals(np.random.default_rng(8), 0.1, 200_000)
    sojourns = sojourn_times(arrivals, 8.0)
    (level,) = mean_in_flight(arrivals, arrivals + sojourns, [0.0, arrivals[-1]])
    assert level == pytest.approx(200_000 / arrivals[-1] * sojourns.mean(), rel=1e-3)


@pytest.mark.parametrize("edges", [[0.0], [0.0, 0.0], [1.0, 0.0]])
def test_windows_need_increasing_edges(edges: list[float]) -> None:
    """A window without width has no mean."""
    with pytest.raises(ValueError, match="increasing"):
        mean_in_flight([0.0], [1.0], edges)
