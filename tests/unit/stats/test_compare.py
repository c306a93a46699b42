"""Comparisons of runs: tests, verdicts and their error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from corun.stats.compare import (
    MAX_SPLITS,
    Verdict,
    compare_runs,
    equality_test,
    holm,
    paired_t_test,
    permutation_test,
    sign_flip_test,
    smallest_detectable,
    split_count,
    welch_test,
)
from corun.stats.percentiles import METHOD
from corun.stats.queues import poisson_arrivals, sojourn_times

values = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=5)
positive = st.lists(st.floats(0.1, 100), min_size=2, max_size=6)


@given(values, values)
@settings(max_examples=60)
def test_the_permutation_test_is_scipys_exact_one(first: list[float], second: list[float]) -> None:
    """p is the share of all splits at least as extreme, two-sided on |difference of means|."""
    pooled = np.array(first + second)
    total, k = pooled.sum(), len(first)
    spread = [abs(a.sum() / k - (total - a.sum()) / len(second)) for a in _all_sides(pooled, k)]
    observed = abs(np.mean(first) - np.mean(second))
    expected = np.mean(np.array(spread) >= observed - 1e-9)
    assert permutation_test(first, second).p == pytest.approx(expected)


def _all_sides(pooled: np.ndarray, k: int) -> list[np.ndarray]:
    masks = [mask for mask in range(2**pooled.size) if mask.bit_count() == k]
    return [pooled[[bool(mask >> i & 1) for i in range(pooled.size)]] for mask in masks]


@given(values, values, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_permutation_test_is_symmetric(first: list[float], second: list[float], random: object) -> None:
    """p depends neither on which side is first, nor on the order of runs, nor on a shift or mirror of all of them."""
    p = permutation_test(first, second).p
    shuffled = list(first)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert permutation_test(second, shuffled).p == pytest.approx(p)
    assert permutation_test([5 - v for v in first], [5 - v for v in second]).p == pytest.approx(p)
    assert 0 < p <= 1


def test_five_runs_a_side_have_252_splits() -> None:
    """Two completely separate sides of five give p = 2 / 252."""
    assert split_count(5, 5) == 252
    test = permutation_test([1, 2, 3, 4, 5], [11, 12, 13, 14, 15])
    assert test.p == pytest.approx(2 / 252)
    assert test.smallest_p == test.p


def test_equal_sides_are_as_alike_as_possible() -> None:
    """Rounding never turns a tie into a smaller p."""
    assert permutation_test([0.1, 0.2, 0.3], [0.3, 0.1, 0.2]).p == 1.0
    assert sign_flip_test([0.0, 0.0]).p == 1.0


@given(st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=8))
@settings(max_examples=60)
def test_sign_flips_are_exact_and_symmetric(differences: list[float]) -> None:
    """p is the share of the 2^k sign patterns at least as extreme, and the same for the negated differences."""
    patterns = [
        sum(v if mask >> i & 1 else -v for i, v in enumerate(differences)) for mask in range(2 ** len(differences))
    ]
    expected = np.mean([abs(total) >= abs(sum(differences)) - 1e-9 for total in patterns])
    assert sign_flip_test(differences).p == pytest.approx(expected)
    assert sign_flip_test([-v for v in differences]).p == pytest.approx(expected)


@given(positive, positive)
@settings(max_examples=60)
def test_welch_and_the_paired_t_are_scipys(first: list[float], second: list[float]) -> None:
    """Both t-tests agree with scipy's wherever there is spread."""
    if np.ptp(first) > 1e-3 and np.ptp(second) > 1e-3:
        expected = scipy_stats.ttest_ind(first, second, equal_var=False).pvalue
        assert welch_test(first, second).p == pytest.approx(expected, rel=1e-6, abs=1e-12)
    if np.ptp(first) > 1e-3:
        expected = scipy_stats.ttest_1samp(first, 0.0).pvalue
        assert paired_t_test(first).p == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("runs", [13, 20])
def test_too_many_splits_are_refused(runs: int) -> None:
    """Enumeration is bounded; the message names the test to use instead."""
    with pytest.raises(ValueError, match="welch_test"):
        permutation_test(list(range(runs)), list(range(runs)))
    with pytest.raises(ValueError, match="paired t-test"):
        sign_flip_test([1.0] * 18)
    assert split_count(10, 10) <= MAX_SPLITS


@pytest.mark.parametrize(
    ("runs", "paired", "method"),
    [
        (5, False, "exact permutation"),
        (4, False, "exact permutation"),
        (3, False, "Welch t"),
        (13, False, "Welch t"),
        (5, True, "paired t"),
        (6, True, "exact sign flips"),
        (18, True, "paired t"),
    ],
)
def test_the_exact_test_decides_where_it_can_reach_alpha(runs: int, paired: bool, method: str) -> None:
    """With so few runs that no outcome could be significant, or too many to enumerate, t decides and says so."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(1, 2, (2, runs))
    assert equality_test(sides[0], sides[1], paired=paired).method == method


BASE = (100.0, 101.0, 99.0, 102.0, 98.0)


@pytest.mark.parametrize(
    ("candidate", "better", "verdict"),
    [
        ((130.0, 131.0, 129.0, 132.0, 128.0), "lower", Verdict.SLOWER),
        ((130.0, 131.0, 129.0, 132.0, 128.0), "higher", Verdict.FASTER),
        ((70.0, 71.0, 69.0, 72.0, 68.0), "lower", Verdict.FASTER),
        ((100.5, 101.0, 98.5, 102.0, 98.5), "lower", Verdict.NO_DIFFERENCE),
        ((60.0, 160.0, 90.0, 120.0, 80.0), "lower", Verdict.CANNOT_TELL),
    ],
)
@pytest.mark.parametrize("paired", [True, False])
def test_verdicts(candidate: tuple[float, ...], better: str, verdict: Verdict, paired: bool) -> None:
    """Separate runs differ; tight equal runs are alike; scattered equal runs cannot tell. Paired or not."""
    comparison = compare_runs(BASE, candidate, paired=paired, better=better)  # type: ignore[arg-type]
    assert comparison.verdict is verdict
    assert comparison.sentence.startswith(str(verdict))
    assert comparison.detectable is not None
    assert comparison.ratio is not None


def test_no_difference_needs_evidence_and_not_its_absence() -> None:
    """The same scatter that cannot exclude 5 % can exclude 100 %: the margin makes the difference."""
    candidate = (95.0, 108.0, 99.0, 104.0, 93.0)
    assert compare_runs(BASE, candidate, margin=0.05).verdict is Verdict.CANNOT_TELL
    assert compare_runs(BASE, candidate, margin=0.5).verdict is Verdict.NO_DIFFERENCE


def test_a_real_but_small_difference_is_marked_negligible() -> None:
    """Two per cent, seen clearly, is "slower" with the remark that it lies within the margin."""
    comparison = compare_runs(BASE, [value * 1.02 for value in BASE], paired=True)
    assert comparison.verdict is Verdict.SLOWER
    assert comparison.negligible
    assert "within the 5% margin" in comparison.sentence


@pytest.mark.parametrize(
    ("baseline", "candidate", "reason"),
    [
        ((100.0,), (200.0,), "repeat the run"),
        ((100.0,) * 5, (200.0,), "repeat the run"),
        ((), (1.0, 2.0), "no run"),
        ((100.0, None, 101.0), (1.0, 2.0, 3.0), "1 of 6 runs lack this number"),
        ((0.0, 1.0), (1.0, 2.0), "positive"),
        ((math.inf, 1.0), (1.0, 2.0), "finite"),
    ],
)
def test_without_spread_or_numbers_nobody_can_tell(
    baseline: tuple[float | None, ...], candidate: tuple[float | None, ...], reason: str
) -> None:
    """One run a side, a missing value, a zero: "cannot tell" with the reason, no p-value and no ratio."""
    comparison = compare_runs(baseline, candidate)
    assert comparison.verdict is Verdict.CANNOT_TELL
    assert comparison.p is None
    assert comparison.ratio is None
    assert comparison.detectable is None
    assert reason in comparison.sentence


def test_bad_arguments_are_refused() -> None:
    """Unequal pairs and impossible margins are mistakes of the caller."""
    with pytest.raises(ValueError, match="both sides"):
        compare_runs([1.0, 2.0], [1.0], paired=True)
    with pytest.raises(ValueError, match="margin"):
        compare_runs([1.0, 2.0], [1.0, 2.0], margin=5)


@given(positive, positive)
@settings(max_examples=60)
def test_swapping_the_sides_swaps_the_verdict(first: list[float], second: list[float]) -> None:
    """Slower one way round is faster the other; "no difference" and "cannot tell" stay."""
    swapped = {Verdict.SLOWER: Verdict.FASTER, Verdict.FASTER: Verdict.SLOWER}
    forward, backward = compare_runs(first, second), compare_runs(second, first)
    assert backward.verdict is swapped.get(forward.verdict, forward.verdict)
    assert forward.p is not None
    assert forward.p == pytest.approx(backward.p)


@given(st.lists(st.floats(50, 60), min_size=3, max_size=8), st.integers(0, 99))
@settings(max_examples=40)
def test_the_detectable_difference_shrinks_with_runs(runs: list[float], seed: int) -> None:
    """Repeating every run of both sides never makes the smallest detectable difference larger."""
    other = np.random.default_rng(seed).permutation(runs) * 1.1
    once = smallest_detectable(runs, other, paired=False)
    twice = smallest_detectable([*runs, *runs], [*other, *other], paired=False)
    assert 0 <= twice <= once + 1e-12


def test_a_detectable_difference_is_detected_at_the_stated_power() -> None:
    """Shifting the candidate by what the true spread makes detectable is found in about 80 % of the trials."""
    rng, sigma, k, found, trials = np.random.default_rng(31), 0.05, 5, 0, 400
    df = 2 * k - 2
    step = scipy_stats.t.ppf(0.975, df) + scipy_stats.t.ppf(0.8, df)
    shift = step * sigma * math.sqrt(2 / k)
    for _ in range(trials):
        sides = rng.normal(0, sigma, (2, k))
        found += welch_test(sides[0], sides[1] + shift).p <= 0.05
    assert 0.72 <= found / trials <= 0.88


def test_the_detectable_difference_needs_a_ratio() -> None:
    """Zeros have no logarithm."""
    with pytest.raises(ValueError, match="positive"):
        smallest_detectable([0.0, 1.0], [1.0, 2.0], paired=False)


def queue_p99s(rng: np.random.Generator, shape: tuple[int, int], length: int) -> np.ndarray:
    """Return p99 sojourns, shape (trials, runs), of independent M/M/1 queues at utilisation 0.8."""
    rows = []
    for _ in range(shape[0]):
        arrivals = poisson_arrivals(rng, 0.8, (shape[1], length))
        sojourns = sojourn_times(arrivals, rng.exponential(1.0, arrivals.shape))
        rows.append(np.quantile(sojourns, 0.99, axis=1, method=METHOD))
    return np.stack(rows)


def test_identical_queues_are_called_different_in_five_per_cent() -> None:
    """A/A on the p99 of five runs a side: the exact permutation test and Welch's t are wrong in about 5 %."""
    p99s = queue_p99s(np.random.default_rng(32), (800, 10), 1000)
    exact = np.mean([permutation_test(row[:5], row[5:]).p <= 0.05 for row in p99s])
    welch = np.mean([welch_test(row[:5], row[5:]).p <= 0.05 for row in p99s])
    assert 0.03 <= exact <= 0.07
    assert 0.02 <= welch <= 0.07


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("runs", [3, 5, 7])
def test_verdicts_on_identical_queues_are_rarely_wrong(paired: bool, runs: int) -> None:
    """A/A through the whole decision, whichever test decides: a difference in at most about 5 %."""
    p99s = queue_p99s(np.random.default_rng(33 + runs), (300, 2 * runs), 662)
    verdicts = [compare_runs(row[:runs], row[runs:], paired=paired).verdict for row in p99s.tolist()]
    wrong = np.mean([verdict in (Verdict.SLOWER, Verdict.FASTER) for verdict in verdicts])
    assert wrong <= 0.08
    assert np.mean([verdict is Verdict.NO_DIFFERENCE for verdict in verdicts]) < 0.05


def test_resampling_one_run_would_be_wrong_most_of_the_time() -> None:
    """Why one run a side cannot tell: iid bootstrap intervals of identical queues are disjoint in most comparisons."""
    rng, wrong, trials = np.random.default_rng(40), 0, 60
    for _ in range(trials):
        arrivals = poisson_arrivals(rng, 0.8, (2, 2000))
        sojourns = sojourn_times(arrivals, rng.exponential(1.0, arrivals.shape))
        means = [side[rng.integers(0, 2000, (200, 2000))].mean(axis=1) for side in sojourns]
        low, high = np.quantile(means[1] - means[0], (0.025, 0.975))
        wrong += not low <= 0 <= high
    assert wrong / trials > 0.6


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=60)
def test_holm_raises_p_values_and_keeps_their_order(p_values: list[float]) -> None:
    """Adjusted values are never smaller than the raw ones, at most 1, in the same order, Bonferroni at the smallest."""
    adjusted = holm(p_values)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(adjusted)
    if p_values:
        assert min(adjusted) == min(1.0, len(p_values) * min(p_values))


def test_holm_matches_a_worked_example() -> None:
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
