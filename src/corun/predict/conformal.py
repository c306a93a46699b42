"""Intervals that cover: split conformal on a calibration block, and an adaptive variant that follows a drifting stream.

Split conformal, one score per side (asymmetric conformalised quantile regression, Romano, Patterson & Candès 2019):

    low score  = lower forecast - actual        offset = the ceil((1 - a/2)(n + 1))-th smallest score
    high score = actual - upper forecast        interval = [lower - offset, upper + offset]

It covers at least 1 - a when calibration and test rows are exchangeable, which requests are not. The adaptive variant
(ACI, Gibbs & Candès 2021) keeps the last scores and moves the level after every hit or miss:
a[t+1] = a[t] + rate * (a - missed[t]); whatever the drift, its long-run coverage approaches 1 - a.
All of it works on logs, where the scores of heavy-tailed values have one scale.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["adaptive", "conformal_quantile", "offsets"]

Floats = NDArray[np.float64]

RATE: Final = 0.02
MEMORY: Final = 1000


def conformal_quantile(scores: Floats, level: float) -> float:
    """The ceil(level * (n + 1))-th smallest score, the largest when there are too few for that."""
    rank = min(math.ceil(level * (scores.size + 1)), scores.size)
    return float(np.sort(scores)[max(rank, 1) - 1])


def offsets(low: Floats, high: Floats, actual: Floats, interval: float) -> tuple[float, float]:
    """What to subtract from the lower and add to the upper forecasts (n,) so that they cover `interval`."""
    level = (1 + interval) / 2
    return conformal_quantile(low - actual, level), conformal_quantile(actual - high, level)


def adaptive(
    low: Floats, high: Floats, actual: Floats, history: tuple[Floats, Floats], interval: float
) -> tuple[Floats, Floats]:
    """Online intervals (n,), (n,) for a stream of forecasts, each made before its own actual value is seen.

    history: calibration scores (low, high) to start from; the last 1,000 are kept.
    """
    target = 1 - interval
    level = target
    sides = [_Scores(scores) for scores in history]
    lower, upper = np.empty_like(low), np.empty_like(high)
    for row in range(actual.size):
        lower[row] = low[row] - sides[0].quantile(1 - level / 2)
        upper[row] = high[row] + sides[1].quantile(1 - level / 2)
        missed = not lower[row] <= actual[row] <= upper[row]
        level = min(max(level + RATE * (target - missed), 0.0), 1.0)
        sides[0].add(float(low[row] - actual[row]))
        sides[1].add(float(actual[row] - high[row]))
    return lower, upper


class _Scores:
    """The last scores, kept sorted."""

    def __init__(self, scores: Floats) -> None:
        self._recent = deque(scores[-MEMORY:].tolist())
        self._sorted = sorted(self._recent)

    def quantile(self, level: float) -> float:
        rank = min(max(math.ceil(level * (len(self._sorted) + 1)), 1), len(self._sorted))
        return float(self._sorted[rank - 1])

    def add(self, score: float) -> None:
        if len(self._recent) >= MEMORY:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._recent.append(score)
        insort(self._sorted, score)
