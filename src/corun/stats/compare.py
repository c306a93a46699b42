"""Is one set of runs slower than another? The run is the unit, and "cannot tell" is an answer.

Two identical M/M/1 queues at utilisation 0.8 compared by resampling the requests of one run each are called
"different" in more than 80 % of the comparisons; compared by five runs a side, in 5 %. So every test here
takes one number a run.

The verdict, on the ratio candidate / baseline with its 95 % interval:

    1/(1+m)        1        1+m            m = margin, 5 % unless told otherwise
       |           |  [--o--]|             slower (or faster): the test rejects equality and the interval
       |           |         |             excludes 1; `negligible` when it still lies inside the margin
       |    [---o--|--]      |             no difference: nothing rejects equality *and* the whole interval lies
       |           |         |             inside the margin, so a difference that matters is excluded
    [--|-----------|--o------|--]          cannot tell: nothing rejects equality, but neither is a difference
                                           larger than the margin excluded; more runs are needed

"No difference" is thus an equivalence claim (two one-sided tests, Schuirmann 1987, at half of alpha because
the interval shown is the two-sided one), never the mere absence of significance. With one run a side there is
no spread to judge by and the verdict is "cannot tell".

Equality is tested by the exact permutation test: nothing is assumed about the distribution of a run's p99.
Where so few runs exist that even the most extreme split is not improbable enough (three a side: 2 of 20; five
pairs: 2 of 32) the t-test on logarithms decides instead, and `method` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import combinations
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corun.stats.intervals import (
    Interval,
    exponential,
    paired_spread,
    ratio_interval,
    ratio_refusal,
    t_quantile,
    welch_spread,
)
from corun.stats.percentiles import as_samples

ALPHA: Final = 0.05
MARGIN: Final = 0.05
POWER: Final = 0.8
MAX_SPLITS: Final = 200_000


class Verdict(StrEnum):
    """What a comparison of runs can say."""

    SLOWER = "slower"
    FASTER = "faster"
    NO_DIFFERENCE = "no difference"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Significance:
    """A two-sided test of "both sides are alike": its p-value, and the smallest p it could have returned."""

    p: float
    smallest_p: float
    method: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate against baseline: verdict, ratio with interval, p-value, and what could have been seen at all.

    `detectable` is the smallest relative difference (0.08 = 8 %) these runs would have shown with probability
    POWER; None when not even that can be said. `negligible` marks a real difference inside the margin.
    `reason` is one clause that explains the verdict.
    """

    verdict: Verdict
    ratio: Interval | None
    p: float | None
    method: str
    detectable: float | None
    margin: float
    baseline_runs: int
    candidate_runs: int
    reason: str
    negligible: bool = False

    @property
    def sentence(self) -> str:
        """The whole comparison as one line for a console or a table cell."""
        parts = [f"{self.verdict}: {self.reason}"]
        if self.ratio is not None:
            parts.append(f"ratio {self.ratio.point:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}]")
        if self.p is not None:
            parts.append(f"p = {self.p:.3g} ({self.method})")
        if self.detectable is not None:
            parts.append(f"smallest detectable difference {self.detectable:.1%}")
        return "; ".join(parts)


def split_count(k: int, m: int) -> int:
    """Return how many ways there are to deal k + m runs into sides of k and m."""
    return math.comb(k + m, k)


@lru_cache(maxsize=16)
def _splits(k: int, total: int) -> NDArray[np.intp]:
    chosen = np.array(list(combinations(range(total), k)), dtype=np.intp)
    chosen.setflags(write=False)
    return chosen


def permutation_test(first: ArrayLike, second: ArrayLike) -> Significance:
    """Return the exact two-sided permutation test of the difference of means (Fisher 1935, Pitman 1937).

    first, second: (k,) and (m,), one value a run. p is the share of all C(k+m, k) ways to deal the pooled runs
    whose difference is at least the observed one; it depends on neither the order of runs nor that of sides.
    Raises ValueError for an empty side or above MAX_SPLITS splits (10 runs a side still fit).
    """
    a, b = as_samples(first), as_samples(second)
    if not a.size or not b.size:
        raise ValueError("a permutation test needs at least one run on each side")
    count = split_count(a.size, b.size)
    if count > MAX_SPLITS:
        raise ValueError(f"{count} splits are more than {MAX_SPLITS}; use welch_test for that many runs")
    pooled = np.concatenate([a, b])
    centred = pooled - pooled.mean()
    sums = np.abs(centred[_splits(a.size, pooled.size)].sum(axis=1))
    observed = abs(float(centred[: a.size].sum()))
    smallest = (2 if a.size == b.size else 1) / count
    return Significance(_share_at_least(sums, observed, centred), smallest, "exact permutation")


def sign_flip_test(differences: ArrayLike) -> Significance:
    """Return the exact two-sided sign-flip test that paired differences centre on zero (Fisher 1935).

    differences: (k,), one a pair of runs. p is the share of all 2^k sign patterns whose sum is at least as far
    from zero as the observed sum. Raises ValueError for no pair or above MAX_SPLITS patterns (k = 17 fits).
    """
    values = as_samples(differences)
    if not values.size:
        raise ValueError("a sign-flip test needs at least one pair")
    if 2**values.size > MAX_SPLITS:
        raise ValueError(f"2^{values.size} patterns are more than {MAX_SPLITS}; use the paired t-test")
    patterns = (np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1
    sums = np.abs((1 - 2 * patterns) @ values)
    return Significance(
        _share_at_least(sums, abs(float(values.sum())), values), 2 / 2**values.size, "exact sign flips"
    )


def _share_at_least(sums: NDArray[np.float64], observed: float, values: NDArray[np.float64]) -> float:
    """Return the share of `sums` not below `observed`, ties included despite rounding."""
    rounding = 1e-10 * float(np.abs(values).sum())
    return float(np.mean(sums >= observed - rounding))


def welch_test(first: ArrayLike, second: ArrayLike) -> Significance:
    """Return Welch's two-sided t-test of equal means with Satterthwaite's degrees of freedom (Welch 1947).

    first, second: (k,) and (m,), at least 2 runs a side (ValueError otherwise).
    """
    a, b = as_samples(first), as_samples(second)
    if min(a.size, b.size) < 2:
        raise ValueError("Welch's test needs at least 2 runs a side")
    return Significance(_two_sided_p(*welch_spread(a, b)), 0.0, "Welch t")


def paired_t_test(differences: ArrayLike) -> Significance:
    """Return Student's two-sided t-test that shape-(k,) paired differences have mean zero; k >= 2."""
    values = as_samples(differences)
    if values.size < 2:
        raise ValueError("a paired t-test needs at least 2 pairs")
    return Significance(_two_sided_p(*paired_spread(np.zeros_like(values), values)), 0.0, "paired t")


def _two_sided_p(shift: float, error: float, df: float) -> float:
    if error == 0:
        return 1.0 if shift == 0 else 0.0
    return min(1.0, 2 * float(special.stdtr(df, -abs(shift) / error)))


def smallest_detectable(
    baseline: ArrayLike, candidate: ArrayLike, *, paired: bool, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Return the smallest relative difference these runs would reveal with probability `power` (0.08 = 8 %).

    exp((t(1 - alpha/2) + t(power)) * standard error of the log ratio) - 1 (Bloom 1995, "Minimum detectable
    effects"), degrees of freedom as in `ratio_interval`. Raises ValueError where no ratio can be formed.
    """
    refusal = ratio_refusal(baseline, candidate)
    if refusal:
        raise ValueError(refusal)
    before, after = np.log(as_samples(baseline)), np.log(as_samples(candidate))
    _, error, df = paired_spread(before, after) if paired else welch_spread(before, after)
    if error == 0:
        return 0.0
    return exponential((t_quantile(1 - alpha / 2, df) + t_quantile(power, df)) * error) - 1


def equality_test(baseline: ArrayLike, candidate: ArrayLike, *, paired: bool, alpha: float = ALPHA) -> Significance:
    """Return the test that decides a comparison: exact where it can reach `alpha`, else t, on logarithms.

    baseline, candidate: positive values, one a run, at least 2 a side; pairs line up by position.
    """
    before, after = np.log(as_samples(baseline)), np.log(as_samples(candidate))
    if paired:
        paired_spread(before, after)
        feasible = 2 / alpha <= 2**before.size <= MAX_SPLITS
        return sign_flip_test(after - before) if feasible else paired_t_test(after - before)
    if split_count(before.size, after.size) <= MAX_SPLITS:
        exact = permutation_test(before, after)
        if exact.smallest_p <= alpha:
            return exact
    return welch_test(before, after)


def compare_runs(
    baseline: Sequence[float | None],
    candidate: Sequence[float | None],
    *,
    paired: bool = False,
    better: Literal["lower", "higher"] = "lower",
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> Comparison:
    """Compare one number a run (say, its p99): is the candidate slower, faster, alike, or can nobody tell?

    baseline, candidate: positive values, one a run; None marks a run that has no such number. `paired`: run i of
    both sides shared a schedule and stood next to each other in time. `better`: "lower" for latencies, energy
    and step times, "higher" for rates; a worse candidate is "slower" either way.
    Raises ValueError for pairs of unequal number, NaN, or a margin or alpha outside (0, 1).
    """
    if not 0 < margin < 1 or not 0 < alpha < 1:
        raise ValueError(f"margin and alpha lie between 0 and 1, got {margin} and {alpha}")
    if paired and len(baseline) != len(candidate):
        raise ValueError(f"pairs need as many runs on both sides, got {len(baseline)} and {len(candidate)}")
    before = [value for value in baseline if value is not None]
    after = [value for value in candidate if value is not None]
    counts = (len(baseline), len(candidate))
    missing = sum(counts) - len(before) - len(after)
    refusal = f"{missing} of {sum(counts)} runs lack this number" if missing else ratio_refusal(before, after)
    if refusal:
        return Comparison(Verdict.CANNOT_TELL, None, None, "", None, margin, *counts, refusal)
    test = equality_test(before, after, paired=paired, alpha=alpha)
    ratio = ratio_interval(before, after, paired=paired, level=1 - alpha).interval
    assert ratio is not None, "ratio_refusal found nothing to refuse"
    verdict, reason, negligible = _judge(ratio, test, better, margin, alpha)
    detectable = smallest_detectable(before, after, paired=paired, alpha=alpha)
    return Comparison(verdict, ratio, test.p, test.method, detectable, margin, *counts, reason, negligible)


def _judge(
    ratio: Interval, test: Significance, better: str, margin: float, alpha: float
) -> tuple[Verdict, str, bool]:
    """Apply the rule drawn at the top of this module; returns (verdict, reason, negligible)."""
    inside = 1 / (1 + margin) <= ratio.low and ratio.high <= 1 + margin
    if test.p <= alpha and not ratio.contains(1.0):
        verdict = Verdict.SLOWER if (ratio.point > 1) == (better == "lower") else Verdict.FASTER
        size = f"{abs(ratio.point - 1):.1%} {'higher' if ratio.point > 1 else 'lower'}"
        return verdict, size + (f", within the {margin:.0%} margin" if inside else ""), inside
    if inside:
        return Verdict.NO_DIFFERENCE, f"the interval lies within the {margin:.0%} margin", False
    return Verdict.CANNOT_TELL, f"a difference above {margin:.0%} is neither shown nor excluded", False


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return Holm's step-down adjusted p-values, in the given order (Holm 1979).

    For a grid of comparisons: rejecting where the adjusted p is at most alpha keeps the chance of even one
    wrong "different" at alpha.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return tuple(adjusted)
