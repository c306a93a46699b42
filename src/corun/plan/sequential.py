"""When may measuring stop: a sequential test of "at most a share q of the requests is late".

After look j the share of late requests has a Clopper-Pearson interval at level alpha / looks (Bonferroni over all looks
that may be made, so stopping at the first that excludes q keeps the error of either kind below alpha):

    high <= q   meets      low > q   misses      else measure on; after the last look: undecided

Requests of one queue are not independent. Counts are scaled by the effective sample size of the series
(corun.stats.correlation), which only widens the interval.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corun.plan.question import Slo
from corun.stats.correlation import effective_size

Word = Literal["meets", "misses", "undecided"]
ALPHA: Final = 0.10
LOOKS: Final = 6
MIN_SERIES: Final = 20


@dataclass(frozen=True)
class Share:
    """Share of late requests with its interval, and what follows for the promise."""

    late: int
    requests: int
    effective: float
    low: float
    high: float
    word: Word


def judge(sojourns_ms: ArrayLike, slo: Slo, looks: int = LOOKS, alpha: float = ALPHA) -> Share:
    """Judge all requests so far, (n,) sojourns in order, inf = no answer; ValueError for looks < 1."""
    if looks < 1:
        raise ValueError(f"a test needs at least one look, got {looks}")
    values = np.asarray(sojourns_ms, dtype=np.float64)
    late, effective = int((values > slo.bound_ms).sum()), _effective(values, slo.percentile)
    low, high = interval(late * effective / max(1, values.size), effective, alpha / looks)
    word: Word = "meets" if high <= slo.share else "misses" if low > slo.share else "undecided"
    return Share(late, values.size, effective, low, high, word)


def interval(late: float, requests: float, alpha: float) -> tuple[float, float]:
    """Clopper and Pearson 1934 at level 1 - alpha, two-sided; counts may be fractions. No request: (0, 1)."""
    if requests <= 0:
        return 0.0, 1.0
    kept = requests - late
    low = 0.0 if late <= 0 else float(special.betaincinv(late, kept + 1, alpha / 2))
    high = 1.0 if kept <= 0 else float(special.betaincinv(late + 1, kept, 1 - alpha / 2))
    return low, high


def together(words: Iterable[Word]) -> Word:
    """A set meets its promise when every service does and misses it when one does."""
    found = list(words)
    if "misses" in found:
        return "misses"
    return "undecided" if "undecided" in found else "meets"


def _effective(values: NDArray[np.float64], percentile: float) -> float:
    """Effective sample size for a percentile, unanswered requests ranked highest; short series count in full."""
    if values.size < MIN_SERIES or not np.isfinite(values).any():
        return float(values.size)
    series = np.where(np.isfinite(values), values, values[np.isfinite(values)].max() + 1)
    return effective_size(series, percentile)
