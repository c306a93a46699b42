"""The tail of one service's latency from its service times: a FIFO queue fed by Poisson arrivals.

The sojourn of request i is W[i] + S[i] + overhead, W from Lindley's recursion (corun.stats.queues) on a fixed list of
unit-rate arrivals stretched to the rate, S drawn from measured service times by inverse transform. All random numbers
are common to every question, so a higher rate or slower service can only raise the answer: the prediction is
monotone, not just on average. A queue with utilisation >= 1 has no tail to speak of: inf.

Check: for exponential service the mean is M/M/1's, for general service Pollaczek-Khinchine's (M/G/1).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.stats.queues import sojourn_times

REQUESTS: Final = 3000
WARM: Final = 200
SEED: Final = 20241207


@cache
def _common() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(SEED)
    return np.cumsum(rng.exponential(1.0, REQUESTS)), rng.random(REQUESTS)


def sojourn_percentile(rate: float, shape: ArrayLike, mean_ms: float, overhead_ms: float, percentile: float) -> float:
    """Predicted percentile (0-100) of the sojourn in ms.

    rate: requests/s. shape: (n,) service times over their mean, n >= 1. mean_ms: the mean they are scaled to.
    """
    if rate * mean_ms >= 1000:
        return float("inf")
    unit_arrivals, draws = _common()
    ordered = np.sort(np.asarray(shape, dtype=np.float64))
    service = mean_ms * ordered[np.minimum((draws * ordered.size).astype(np.intp), ordered.size - 1)]
    if rate <= 0:
        return float(np.quantile(service, percentile / 100, method="higher")) + overhead_ms
    sojourn = sojourn_times(unit_arrivals * (1000 / rate), service)
    return float(np.quantile(sojourn[WARM:], percentile / 100, method="higher")) + overhead_ms
