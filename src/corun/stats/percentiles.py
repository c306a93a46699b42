"""Exact percentiles from raw samples, and the sample count below which a percentile is not quoted.

A percentile is one of the samples, never a value between two and never a histogram bucket: with METHOD
"higher" it is the first sample at or above the requested rank, so a reported p99 was really waited for and
an unbounded wait (``inf``: the reply never came) can be ranked without poisoning the rest.

A tail percentile of few samples is an anecdote. The floor asks that, even if the samples were independent,
seeing at most one of them above the true percentile be improbable:

    floor(p) = smallest n with P[Binomial(n, 1 - p) <= 1] <= 1 - c,   c = 0.99

which reproduces the minimum query counts of the MLPerf inference LoadGen's early-stopping table
(11 / 64 / 130 / 662 / 6,636 for p50 / p90 / p95 / p99 / p99.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

METHOD: Final[Literal["higher"]] = "higher"
PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
FLOOR_CONFIDENCE: Final = 0.99


def fraction(percentile: float) -> float:
    """Return the percentile as the nearest decimal fraction in (0, 1): 99.9 gives 0.999, not 0.9990000000000001.

    One unit in the last place is enough to move the rank by a whole sample, e.g. at n = 1001.
    Raises ValueError outside (0, 100).
    """
    if not 0 < percentile < 100:
        raise ValueError(f"a percentile lies between 0 and 100, got {percentile}")
    return round(percentile / 100, 12)


def _at_most_one(n: int, tail: float) -> float:
    """Return P[Binomial(n, tail) <= 1] = (1 - tail)^n + n tail (1 - tail)^(n - 1)."""
    rest = math.exp((n - 1) * math.log1p(-tail))
    return rest * (1 - tail + n * tail)


@cache
def sample_floor(percentile: float) -> int:
    """Return the smallest sample count at which `percentile` (0-100) is quoted.

    Source: MLPerf inference LoadGen, early-stopping minimum query counts, confidence 0.99.
    """
    tail = 1 - fraction(percentile)
    high = 2
    while _at_most_one(high, tail) > 1 - FLOOR_CONFIDENCE:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if _at_most_one(middle, tail) > 1 - FLOOR_CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


FLOORS: Final[Mapping[float, int]] = MappingProxyType({p: sample_floor(p) for p in PERCENTILES})


def as_samples(samples: ArrayLike) -> NDArray[np.float64]:
    """Return `samples` as a float64 vector of shape (n,).

    Raises ValueError for another shape and for NaN: a missing value is left out by the caller, who knows why.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"samples must be one-dimensional, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {values.size} samples are NaN; leave missing values out")
    return values


def percentile_of(samples: ArrayLike, percentile: float) -> float | None:
    """Return the exact percentile (0-100) of shape-(n,) samples in their unit, or None below its floor."""
    values = as_samples(samples)
    if values.size < sample_floor(percentile):
        return None
    return float(np.quantile(values, fraction(percentile), method=METHOD))


def percentiles_of(samples: ArrayLike, percentiles: Sequence[float] = PERCENTILES) -> tuple[float | None, ...]:
    """Return several exact percentiles of shape-(n,) samples, None for each below its floor."""
    values = np.sort(as_samples(samples))
    return tuple(percentile_of(values, percentile) for percentile in percentiles)


@dataclass(frozen=True, slots=True)
class Summary:
    """What one set of samples says; values carry the samples' unit, None means too few samples to say.

    `maximum` and `mean` are None only when there is no sample at all.
    """

    n: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    maximum: float | None
    mean: float | None


def summarise(samples: ArrayLike) -> Summary:
    """Summarise shape-(n,) samples (n may be 0); percentiles below their floor are None."""
    values = np.sort(as_samples(samples))
    p50, p90, p95, p99, p999 = (percentile_of(values, percentile) for percentile in PERCENTILES)
    if values.size == 0:
        return Summary(0, p50, p90, p95, p99, p999, None, None)
    return Summary(values.size, p50, p90, p95, p99, p999, float(values[-1]), float(values.mean()))
