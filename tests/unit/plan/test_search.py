"""Bisection and the sequential test: how many questions they ask and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.plan.question import Slo
from corun.plan.search import ENUMERATE, bisect_count, bisect_rate, subsets
from corun.plan.sequential import LOOKS, interval, judge, together


@given(st.integers(1, 200), st.integers(0, 201), st.integers(-5, 300))
@settings(max_examples=100)
def test_the_threshold_is_found_in_logarithmically_many_questions(high: int, threshold: int, guess: int) -> None:
    """Whatever the guess, each size is asked once and at most 2 log2(n) + 2 sizes are asked."""
    threshold = min(threshold, high)
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= threshold

    assert bisect_count(1, high, fits, guess) == threshold
    assert len(asked) == len(set(asked)) <= 2 * math.log2(high + 1) + 2


@given(st.integers(1, 200), st.integers(0, 200))
@settings(max_examples=50)
def test_a_good_guess_costs_two_questions(high: int, threshold: int) -> None:
    """The guess and its neighbour decide when the guess is right."""
    threshold = min(threshold, high)
    asked: list[int] = []
    bisect_count(1, high, lambda size: bool(asked.append(size)) or size <= threshold, threshold)
    assert len(asked) <= 2


def test_without_candidates_nothing_is_asked() -> None:
    """An empty range has the answer 0."""
    assert bisect_count(1, 0, lambda size: pytest.fail("asked")) == 0


@given(st.floats(0.01, 10), st.floats(1, 1000), st.floats(0.001, 2000))
@settings(max_examples=60)
def test_the_rate_is_found_to_one_percent(low: float, span: float, threshold: float) -> None:
    """The largest passing rate within one percent, the whole range when all pass, 0 when none does."""
    high, asked = low * span, 0

    def fits(rate: float) -> bool:
        nonlocal asked
        asked += 1
        return rate <= threshold

    found = bisect_rate(low, high, fits)
    if threshold < low:
        assert found == 0
    elif threshold >= high:
        assert found == high
    else:
        assert found <= threshold <= found * 1.0101
    assert asked <= math.log2(max(2.0, math.log(max(span, 1.02)) / math.log(1.01))) + 4


@given(st.integers(1, 20), st.data())
@settings(max_examples=30)
def test_sets_have_the_size_asked_for_and_the_best_is_among_them(count: int, data: st.DataObject) -> None:
    """All sets of a few candidates; of many, the best by score and its neighbours, none twice."""
    size = data.draw(st.integers(1, count))
    items = list(range(count))
    found = subsets(items, size, float)
    assert {len(set(one)) for one in found} == {size}
    assert set(range(count - size, count)) in [set(one) for one in found]
    if count <= ENUMERATE:
        assert len(found) == math.comb(count, size)


@pytest.mark.parametrize(("share", "wrong"), [(0.004, "misses"), (0.025, "meets")])
def test_stopping_early_keeps_the_error_rate(share: float, wrong: str) -> None:
    """Looking after every window and stopping at the first decision is wrong in at most 5 % of synthetic runs."""
    rng = np.random.default_rng(7)
    slo, runs, errors = Slo(99, 1.0), 300, 0
    for _ in range(runs):
        late = np.where(rng.random(1200) < share, 2.0, rng.random(1200))
        words = [judge(late[: 200 * (look + 1)], slo).word for look in range(LOOKS)]
        errors += next((word for word in words if word != "undecided"), "undecided") == wrong
    assert errors <= 0.05 * runs


def test_clear_cases_are_decided_at_the_first_look() -> None:
    """A p90 far below or far above its bound needs one window only."""
    rng = np.random.default_rng(3)
    fast = rng.exponential(1.0, 300)
    assert judge(fast, Slo(90, 50)).word == "meets"
    assert judge(fast, Slo(90, 0.5)).word == "misses"


def test_requests_without_an_answer_are_late() -> None:
    """inf counts as over any bound."""
    assert judge([np.inf] * 100, Slo(99, 1e9)).word == "misses"


@given(st.lists(st.sampled_from([0.5, 2.0, float("inf")]), max_size=60))
@settings(max_examples=60)
def test_the_interval_holds_the_share(values: list[float]) -> None:
    """low <= late / n <= high, (0, 1) without requests, and more looks only widen it."""
    found, stricter = judge(values, Slo(90, 1.0), looks=1), judge(values, Slo(90, 1.0), looks=6)
    share = found.late / len(values) if values else 0.5
    assert stricter.low <= found.low <= share + 1e-9
    assert share - 1e-9 <= found.high <= stricter.high


def test_the_interval_is_clopper_and_pearson() -> None:
    """0 of 20 late at level 95 %: the textbook's upper bound 16.8 %."""
    assert interval(0, 20, 0.05) == pytest.approx((0.0, 0.1684), abs=1e-4)
    assert interval(0, 0, 0.05) == (0.0, 1.0)


def test_one_late_service_decides_for_the_set() -> None:
    """misses beats undecided beats meets; nobody keeps every promise."""
    assert together(["meets", "misses", "undecided"]) == "misses"
    assert together(["meets", "undecided"]) == "undecided"
    assert together([]) == "meets"
