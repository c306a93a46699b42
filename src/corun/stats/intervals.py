"""Confidence intervals, each labelled with what it rests on, and refusals where there is nothing to rest on.

The headline is a t-interval over k independent replications (whole runs): requests of one run share a queue and
are not independent, so an interval from the requests of one run claims far more than it knows. M/D/1 queue at
utilisation 0.8, 95 % intervals for p99: order statistics of one run cover 20-25 %, five runs of 4,000 requests
89 %, five runs of 1,000 requests only 77 %, *ten* runs of 1,000 requests 63 %. Short correlated runs
underestimate the tail; more of them only narrow the interval around the wrong place. So a replication must
be long before it counts (`minimum_length`), and the interval is refused below that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corun.stats.correlation import effective_size
from corun.stats.percentiles import as_samples, fraction, percentile_of, sample_floor

LEVEL: Final = 0.95
MIN_REPLICATIONS: Final = 5
TAIL_REQUESTS: Final = 40
BODY_REQUESTS: Final = 800
REFERENCE_UTILISATION: Final = 0.8


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval around a point estimate, all three in one unit; low <= point <= high.

    `k` counts the independent units behind it (replications, or samples when treated as such); `label` says how
    far to believe it; `effective` is the effective number of independent samples where that differs from k.
    An infinite bound means that the data set no bound on that side.
    """

    low: float
    high: float
    point: float
    method: str
    k: int
    label: str = ""
    level: float = LEVEL
    effective: float | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.point <= self.high:
            raise ValueError(f"an interval holds its point: {self.low} <= {self.point} <= {self.high} is false")

    def contains(self, value: float) -> bool:
        """Say whether `value` lies inside, bounds included."""
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """High minus low, in the interval's unit."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Estimate:
    """Either an interval, or None and the reason why there is none; exactly one of the two is given."""

    interval: Interval | None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.interval is None) != bool(self.reason):
            raise ValueError("an estimate is an interval, or no interval and a reason")


def t_quantile(probability: float, df: float) -> float:
    """Return Student's t quantile for `df` degrees of freedom (any positive real)."""
    return float(special.stdtrit(df, probability))


def minimum_length(percentile: float = 99.0, utilisation: float = REFERENCE_UTILISATION) -> int:
    """Return how many requests one replication needs before its percentile may enter a headline interval.

        max(sample_floor(p), max(800, 40 / (1 - p)) * ((1 - 0.8) / (1 - utilisation))^2)

    Forty requests above the percentile at utilisation 0.8, which is 4,000 for p99. The memory of a queue grows
    as (1 - utilisation)^-2 (Whitt 1989, "Planning queueing simulations"), so a busier server needs longer runs
    and an idle one shorter. Simulated M/D/1 coverage of five such replications, nominal .95: p99 .92 at
    utilisation 0.5, .89 at 0.8, .88 at 0.9, .85 at 0.95; p50 .93-.96; p95 .86-.95; p99.9 .93 at 0.5, .87 at 0.8.
    Raises ValueError unless 0 <= utilisation < 1: a saturated server has no percentile to estimate.
    """
    if not 0 <= utilisation < 1:
        raise ValueError(f"utilisation must lie in [0, 1), got {utilisation}")
    memory = ((1 - REFERENCE_UTILISATION) / (1 - utilisation)) ** 2
    wanted = memory * max(BODY_REQUESTS, TAIL_REQUESTS / (1 - fraction(percentile)))
    return max(sample_floor(percentile), math.ceil(wanted - 1e-6))


def t_interval(values: ArrayLike, *, level: float = LEVEL, label: str = "") -> Estimate:
    """Return mean +- t(k-1) s / sqrt(k) of k independent values, shape (k,), one per run (Law, section 4.5).

    Refused for k < 2: one run has no spread. For a latency percentile use `replication_interval`.
    """
    data = as_samples(values)
    k = data.size
    if k < 2:
        return Estimate(None, f"an interval needs at least 2 runs, got {k}")
    if not np.isfinite(data).all():
        return Estimate(None, "a run has an unbounded value, so the mean over runs has no interval")
    point, half = _mean_and_half_width(data, level)
    return Estimate(Interval(point - half, point + half, point, "t over runs", k, label, level))


def replication_interval(
    values: Sequence[float | None],
    lengths: Sequence[int],
    *,
    percentile: float = 99.0,
    utilisation: float = REFERENCE_UTILISATION,
    min_runs: int = MIN_REPLICATIONS,
    min_length: int | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Return the headline: a t-interval over k runs' percentiles, or the reason why it would mislead.

    values: the percentile of each run (None where the run had too few samples); lengths: requests each run
    measured after warm-up. `min_length` None means `minimum_length(percentile, utilisation)`.
    """
    if len(values) != len(lengths):
        raise ValueError(f"{len(values)} values but {len(lengths)} lengths; give one of each a run")
    needed = minimum_length(percentile, utilisation) if min_length is None else min_length
    usable = [value for value in values if value is not None]
    if len(values) < min_runs:
        return Estimate(None, f"{len(values)} runs; the headline interval needs at least {min_runs}")
    if min(lengths) < needed:
        return Estimate(
            None,
            f"the shortest run has {min(lengths)} requests; p{percentile:g} at utilisation {utilisation:g} needs"
            f" {needed} a run (lengthen the runs, more short runs would only mislead)",
        )
    if len(usable) < len(values):
        return Estimate(None, f"{len(values) - len(usable)} of {len(values)} runs have no p{percentile:g}")
    return t_interval(usable, level=level, label=f"p{percentile:g} over {len(usable)} independent runs")


def percentile_interval(
    runs: Sequence[ArrayLike],
    percentile: float = 99.0,
    *,
    utilisation: float = REFERENCE_UTILISATION,
    min_length: int | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Return the headline interval from the raw samples of each run, warm-up removed (see replication_interval)."""
    samples = [as_samples(run) for run in runs]
    return replication_interval(
        [percentile_of(run, percentile) for run in samples],
        [run.size for run in samples],
        percentile=percentile,
        utilisation=utilisation,
        min_length=min_length,
        level=level,
    )


def ratio_interval(baseline: ArrayLike, candidate: ArrayLike, *, paired: bool, level: float = LEVEL) -> Estimate:
    """Return candidate / baseline with a t-interval on the logarithm, so that swapping the sides inverts it.

    baseline, candidate: (k,) and (m,) positive values, one per run. The point is the ratio of geometric means.
    Paired (k = m, same schedule on both sides): exp(mean(d) +- t(k-1) s_d / sqrt(k)), d = ln(candidate / baseline).
    Unpaired: Welch's interval on the difference of mean logarithms, with Satterthwaite's degrees of freedom
    (Welch 1947). Refused below 2 runs a side, and for values that are not positive and finite.
    """
    refusal = ratio_refusal(baseline, candidate)
    if refusal:
        return Estimate(None, refusal)
    before, after = np.log(as_samples(baseline)), np.log(as_samples(candidate))
    shift, error, df = paired_spread(before, after) if paired else welch_spread(before, after)
    half = t_quantile((1 + level) / 2, df) * error if error > 0 else 0.0
    method = "paired t on log ratios" if paired else "Welch t on logarithms"
    low, point, high = (exponential(value) for value in (shift - half, shift, shift + half))
    return Estimate(Interval(low, high, point, method, min(before.size, after.size), "ratio of runs", level))


def order_statistic_interval(samples: ArrayLike, percentile: float, *, level: float = LEVEL) -> Estimate:
    """Return the distribution-free interval [x(l), x(u)] for a percentile, *as if* the samples were independent.

    l and u are the ranks with P[l <= Binomial(n, p) < u] >= level (David & Nagaraja, "Order Statistics",
    section 7.1). samples: (n,) in the order they happened. Requests behind one queue are not independent: the
    label and `effective` tell how many independent samples they are worth. With too few samples for an upper
    rank the bound is infinite. Refused below the percentile's floor.
    """
    values = as_samples(samples)
    point = percentile_of(values, percentile)
    if point is None:
        return Estimate(None, f"{values.size} samples; p{percentile:g} needs {sample_floor(percentile)}")
    lower, upper = _ranks(values.size, fraction(percentile), level)
    ordered = np.sort(values)
    low = float(ordered[lower - 1]) if lower >= 1 else -math.inf
    high = float(ordered[upper - 1]) if upper <= values.size else math.inf
    effective = effective_size(values, percentile)
    label = f"within one run, as if independent; {values.size} samples are worth {effective:.0f}"
    low, high = min(low, point), max(high, point)
    return Estimate(Interval(low, high, point, "order statistics", values.size, label, level, effective))


def _mean_and_half_width(data: NDArray[np.float64], level: float) -> tuple[float, float]:
    spread = float(data.std(ddof=1))
    return float(data.mean()), t_quantile((1 + level) / 2, data.size - 1) * spread / math.sqrt(data.size)


def exponential(value: float) -> float:
    """Return e^value, infinite where a float cannot hold it."""
    return math.exp(value) if value < 709 else math.inf


def _ranks(n: int, probability: float, level: float) -> tuple[int, int]:
    """Return 1-based ranks (l, u) of the order-statistic interval; l may be 0 and u may be n + 1: no bound."""
    tail = (1 - level) / 2
    middle, reach = n * probability, 10 * math.sqrt(n) + 10
    first, last = max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach))
    counts = special.bdtr(np.arange(first, last + 1), n, probability)
    lower = int(np.searchsorted(counts, tail, side="right"))
    upper = int(np.searchsorted(counts, 1 - tail, side="left")) + 1
    return first + lower, first + upper


def ratio_refusal(baseline: ArrayLike, candidate: ArrayLike) -> str:
    """Return why no ratio with an interval can be formed from these runs, or an empty string."""
    before, after = as_samples(baseline), as_samples(candidate)
    fewest = min(before.size, after.size)
    if fewest < 2:
        return f"{fewest} run on a side has no spread; repeat the run" if fewest else "a side has no run"
    for values in (before, after):
        if not (np.isfinite(values) & (values > 0)).all():
            return "a ratio needs positive, finite values in every run"
    return ""


def paired_spread(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return (mean difference, its standard error, degrees of freedom) of k pairs; ValueError if not pairs."""
    if before.size != after.size:
        raise ValueError(f"pairs need as many runs on both sides, got {before.size} and {after.size}")
    differences = after - before
    error = float(differences.std(ddof=1)) / math.sqrt(differences.size)
    return float(differences.mean()), error, float(differences.size - 1)


def welch_spread(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return (difference of means, its standard error, Satterthwaite's degrees of freedom), Welch 1947."""
    first, second = float(before.var(ddof=1)) / before.size, float(after.var(ddof=1)) / after.size
    shift, total = float(after.mean() - before.mean()), first + second
    if total == 0:
        return shift, 0.0, float(before.size + after.size - 2)
    shares = (first / total) ** 2 / (before.size - 1) + (second / total) ** 2 / (after.size - 1)
    return shift, math.sqrt(total), 1 / shares
