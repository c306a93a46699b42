"""Causal rows, dense windows and splits: nothing of the future reaches a feature."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.predict.data import NS, Requests
from corun.predict.series import request_series, split, visible_order, window_series


def made(
    seconds: list[float],
    prompts: list[float] | None = None,
    answers: list[float] | None = None,
    took: float | None = None,
) -> Requests:
    count = len(seconds)
    t_ns = np.rint(np.sort(np.array(seconds)) * NS).astype(np.int64)
    elapsed = None if took is None else np.full(count, took)
    return Requests(
        t_ns,
        np.array(prompts or [10.0] * count),
        np.array(answers or [1.0] * count),
        elapsed,
        "burstgpt",
    )


def test_targets_of_a_row_are_the_gap_before_it_and_its_own_tokens() -> None:
    """Alignment on a ramp: row i is request i + 1, its gap the one that precedes it."""
    series = request_series(made([0, 1, 3, 6], [1, 2, 3, 4], [5, 6, 7, 8]), 0.0)
    assert series.targets.tolist() == [[1, 2, 6], [2, 3, 7], [3, 4, 8]]


def test_a_response_is_no_feature_before_it_is_complete() -> None:
    """With a recorded duration of 2 s, the answer to the request at 1 s shows from the arrival at 3 s on."""
    series = request_series(made([0, 1, 2, 3, 4], answers=[9, 100, 200, 300, 400], took=2.0))
    shown = np.expm1(series.features[:, 2])
    assert shown[:2].tolist() == [0.0, 0.0]
    assert shown[2:] == pytest.approx([100.0, 200.0])


def test_the_lag_stands_in_where_no_duration_is_recorded() -> None:
    """A response counts as complete `response_lag_s` after its arrival."""
    series = request_series(made([0, 1, 2, 3], answers=[9, 100, 200, 300]), response_lag_s=1.0)
    assert series.visible[:, 2].tolist() == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 50, allow_nan=False), min_size=8, max_size=40),
    st.integers(1, 5),
    st.floats(0, 20),
)
def test_later_rows_never_change_earlier_features(gaps: list[float], back: int, lag_s: float) -> None:
    """Whatever comes after row k, the features up to row k and what is visible then are the same."""
    stamps = np.cumsum(gaps).tolist()
    answers = [float(k * 7 % 23) for k in range(len(gaps))]
    whole, cut = made(stamps, answers=answers), len(gaps) - back
    part = request_series(whole.block(0, cut), lag_s)
    full = request_series(whole, lag_s)
    assert np.array_equal(full.features[: len(part)], part.features)
    for target in range(3):
        values, known = visible_order(full, target)
        shorter, known_then = visible_order(part, target)
        assert np.array_equal(known[: len(part)], known_then[:-1])
        last = int(known_then[-2])
        assert np.array_equal(values[:last], shorter[:last])


def test_windows_are_dense_and_count_zeros() -> None:
    """An empty window counts 0; the last, partial window is dropped."""
    series = window_series(made([0, 0.5, 3.2, 4.9]), 1.0, 0.0)
    assert series.targets[:, 0].tolist() == [2, 0, 0, 1]


def test_windows_can_end_at_an_instant() -> None:
    """For a forecast the last window ends now, exclusive, and the first, partial one is dropped."""
    series = window_series(made([0, 0.6, 1.0, 2.5]), 1.0, 0.0, end_ns=int(2.5 * NS))
    assert series.targets[:, 0].tolist() == [2, 0]


def test_response_tokens_count_where_they_complete() -> None:
    """A window's tokens are known when it closes: prompts that came, responses that finished."""
    series = window_series(made([0, 1.5, 3.9], [10, 20, 30], [100, 200, 300], took=1.0), 1.0)
    assert series.targets[:, 1].tolist() == [10, 120, 200]


def test_two_days_add_the_time_of_day() -> None:
    """Below two days the time of day would only be a clock of the trace."""
    hours = [3600.0 * hour for hour in range(72)]
    assert window_series(made(hours), 3600.0).features.shape[1] == 4
    assert window_series(made(hours[:24]), 3600.0).features.shape[1] == 2


@given(st.integers(300, 5000), st.integers(1, 20), st.integers(1, 5))
def test_parts_are_in_order_with_gaps(rows: int, gap: int, minimum: int) -> None:
    """60/10/10/20 by time; at least `gap` rows between train, validation, calibration and test."""
    try:
        parts = split(rows, gap, minimum)
    except InputError:
        return
    edges = [parts.train, parts.validation, parts.calibration, parts.test]
    assert all(later.start >= earlier.stop + gap for earlier, later in pairwise(edges))
    assert parts.train.stop <= parts.early.start < parts.early.stop <= parts.validation.start
    assert parts.test.stop == rows
    assert parts.early.stop == int(0.6 * rows)


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    """The message says how many rows would do, and that many do."""
    with pytest.raises(InputError, match="give at least 1010") as caught:
        split(100, 80, 20)
    assert "100 rows are too few" in str(caught.value)
    split(1010, 80, 20)
