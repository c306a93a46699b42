"""Recorded arrivals: laps, compression, thinning, spreading, replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.arrivals.recorded import MinuteCounts, Replay, Trace
from corun.arrivals.validator import cv
from corun.errors import InputError

GAPS = st.lists(st.floats(0.001, 10), min_size=2, max_size=60)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def trace(gaps: list[float]) -> Trace:
    ends = np.cumsum(gaps)
    return Trace(np.concatenate([[0.0], ends[:-1]]), float(ends[-1]))


@settings(max_examples=60, deadline=None)
@given(GAPS, st.floats(0.1, 4))
def test_a_trace_repeats_when_short_and_is_cut_when_long(gaps: list[float], laps: float) -> None:
    """The arrivals in [0, T) are those of the trace laid end to end, none beyond T; rounding decides for one at T."""
    recorded = trace(gaps)
    duration_s = recorded.span_s * laps
    stamps = recorded.draw(rng(), duration_s)
    endless = np.concatenate([recorded.offsets_s + lap * recorded.span_s for lap in range(6)])
    assert stamps.tolist() == endless[: stamps.size].tolist()
    assert (stamps < duration_s).all()
    assert stamps.size >= (endless < duration_s * (1 - 1e-12)).sum()


@settings(max_examples=60, deadline=None)
@given(GAPS, st.floats(0.1, 1000))
def test_compression_scales_time_only(gaps: list[float], rate: float) -> None:
    """A compressed trace has the target rate and the same gaps but for one factor: CV does not change."""
    recorded = trace(gaps)
    fast = recorded.compressed(rate)
    assert fast.rate == pytest.approx(rate)
    assert fast.gaps_s * fast.rate == pytest.approx(recorded.gaps_s * recorded.rate, rel=1e-6, abs=1e-9)


def test_thinning_keeps_a_share_of_the_requests_at_their_times() -> None:
    """A thinned trace is a random subset of the trace; its mean rate is the target within sampling error."""
    recorded = trace([0.01] * 1000)
    stamps = recorded.thinned(20.0).draw(rng(1), 100.0)
    assert stamps.size == pytest.approx(2000, abs=4 * np.sqrt(2000 * 0.8))
    assert np.isin(stamps, recorded.draw(rng(), 100.0)).all()
    assert recorded.thinned(20.0).thinned(10.0).rate == pytest.approx(10.0)


def test_thinning_cannot_add_requests() -> None:
    """A target above the trace's own rate is refused, and the error names the way out."""
    with pytest.raises(InputError, match="compress time instead"):
        trace([1.0, 1.0]).thinned(5.0)


def test_spreading_moves_arrivals_inside_their_resolution() -> None:
    """Ten requests stamped with one whole second are due all over that second, never before or after it."""
    recorded = Trace(np.repeat(np.arange(50.0), 10), 50.0, spread_s=1.0)
    stamps = recorded.draw(rng(4), 50.0)
    assert np.bincount(stamps.astype(int), minlength=50).tolist() == [10] * 50
    assert np.unique(stamps).size == stamps.size


def test_gaps_close_the_lap() -> None:
    """n arrivals have n gaps; the last leads into the next lap."""
    assert trace([1.0, 2.0, 3.0]).gaps_s.tolist() == [1.0, 2.0, 3.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=10).filter(any), st.integers(0, 2**32))
def test_minute_counts_are_kept_minute_by_minute(counts: list[int], seed: int) -> None:
    """Two laps of the counts hold each minute's count exactly, at random places inside the minute."""
    stamps = MinuteCounts(tuple(counts)).draw(rng(seed), 2 * 60.0 * len(counts))
    found = np.bincount((stamps // 60).astype(int), minlength=2 * len(counts))
    assert found.tolist() == counts + counts


def test_minute_counts_can_be_thinned_and_compressed() -> None:
    """Both reach the target rate; compression shortens the minute, thinning does not."""
    recorded = MinuteCounts((60_000, 120_000))
    assert recorded.rate == 1500.0
    thin = recorded.thinned(15.0)
    assert (thin.bin_s, thin.rate) == (60.0, pytest.approx(15.0))
    assert thin.draw(rng(2), 120.0).size == pytest.approx(1800, abs=4 * np.sqrt(1800))
    fast = thin.compressed(150.0)
    assert (fast.bin_s, fast.rate) == (pytest.approx(6.0), pytest.approx(150.0))
    assert fast.draw(rng(2), 12.0).size == pytest.approx(1800, abs=4 * np.sqrt(1800))


def test_arrivals_inside_a_thinned_minute_are_poisson() -> None:
    """Given a large count, thinned to a few requests a second, the gaps inside a minute have CV 1."""
    stamps = MinuteCounts((600_000,)).thinned(50.0).draw(rng(5), 60.0)
    assert cv(np.diff(stamps)) == pytest.approx(1.0, abs=4 / np.sqrt(stamps.size))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25 * 86_400 * 10**9), min_size=1, max_size=50), st.integers(0, 10**15))
def test_replay_returns_the_recorded_nanoseconds(stamps: list[int], start_ns: int) -> None:
    """A replay is exact: recorded int64 ns survive the way through seconds, sorted, whatever the segment's start."""
    recorded = np.array(stamps, dtype=np.int64)
    replay = Replay.from_ns(recorded + start_ns, start_ns)
    again = np.rint(replay.draw(rng(), 3e6) * 1e9).astype(np.int64)
    assert again.tolist() == sorted(stamps)


def test_replay_is_cut_and_never_repeated() -> None:
    """A longer segment holds no more than was recorded; a shorter one only its beginning."""
    replay = Replay.from_ns(np.array([0, 5 * 10**8, 2 * 10**9]))
    assert replay.draw(rng(), 100.0).tolist() == [0.0, 0.5, 2.0]
    assert replay.draw(rng(), 1.0).tolist() == [0.0, 0.5]


REFUSED = [
    (lambda: Trace(np.array([]), 1.0), "holds no arrival"),
    (lambda: Trace(np.array([2.0, 1.0]), 3.0), "not finite and ascending"),
    (lambda: Trace(np.array([0.0, np.nan]), 3.0), "not finite and ascending"),
    (lambda: Trace(np.array([0.0, 4.0]), 3.0), "do not lie within"),
    (lambda: Trace(np.array([0.0]), 0.0), "span_s must be above 0"),
    (lambda: Trace(np.array([0.0]), 1.0, keep=0.0), "keep must be"),
    (lambda: Trace(np.array([0.0]), 1.0, spread_s=-1.0), "spread_s must be"),
    (lambda: MinuteCounts(()), "hold no arrival"),
    (lambda: MinuteCounts((5, -1)), "negative"),
    (lambda: Replay.from_ns(np.array([], dtype=np.int64)), "no arrival to replay"),
    (lambda: Replay.from_ns(np.array([-1])), "only open loops"),
    (lambda: Trace(np.array([0.0]), 1.0).compressed(0.0), "rate must be above 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_recordings_without_sense_are_refused(make: object, message: str) -> None:
    """A recording that cannot be played is refused where it is made."""
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_a_trace_cannot_be_changed_from_outside() -> None:
    """The recorded arrivals are a read-only copy."""
    offsets = np.array([0.0, 1.0])
    recorded = Trace(offsets, 2.0)
    offsets[1] = 9.0
    assert recorded.offsets_s.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        recorded.offsets_s[0] = 5.0
