"""The tail of one service's latency from its service times: a FIFO queue fed by Poisson arrivals, batched or not.

The sojourn of request i is W[i] + S[i] + overhead, W from Lindley's recursion (corun.stats.queues) on a fixed list of
unit-rate arrivals stretched to the rate, S drawn from measured service times by inverse transform. All random numbers
are common to every question, so a higher rate or slower service can only raise the answer: the prediction is
monotone, not just on average. A queue with utilisation >= 1 has no tail to speak of: inf.

A service that answers in batches of up to B takes S(n) = mean * growth[n - 1] for n requests: W + S from
corun.plan.bulk on the same numbers. Utilisation is then that of full batches, and monotone it is no more.

Check: for exponential service the mean is M/M/1's, for general service Pollaczek-Khinchine's (M/G/1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.plan.bulk import Bulk, serve
from corun.stats.queues import sojourn_times

REQUESTS: Final = 3000
WARM: Final = 200
SEED: Final = 20241207


@cache
def _common(requests: int = REQUESTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(SEED)
    return np.cumsum(rng.exponential(1.0, requests)), rng.random(requests)


def sojourn_percentile(
    rate: float,
    shape: ArrayLike,
    mean_ms: float,
    overhead_ms: float,
    percentile: float,
    growth: Sequence[float] = (1.0,),
    max_delay_ms: float = 0.0,
    requests: int = REQUESTS,
) -> float:
    """Predicted percentile (0-100) of the sojourn in ms.

    rate: requests/s. shape: (n,) service times over their mean, n >= 1. mean_ms: the mean they are scaled to, of a
    batch of one. growth: time of a batch of 1 .. B over that of one. max_delay_ms: how long a batch is held.
    requests: how many are simulated.
    """
    if rate * mean_ms * growth[-1] >= 1000 * len(growth):
        return float("inf")
    unit_arrivals, draws = _common(requests)
    if len(growth) > 1 and rate > 0:
        sojourn = _bulk(rate, _as_tuple(shape), mean_ms, tuple(growth), max_delay_ms, requests).sojourns
    else:
        service = mean_ms * _spread(shape, draws)
        if rate <= 0:
            held_ms = max_delay_ms if len(growth) > 1 else 0.0
            return float(np.quantile(service, percentile / 100, method="higher")) + held_ms + overhead_ms
        sojourn = sojourn_times(unit_arrivals * (1000 / rate), service)
    return float(np.quantile(sojourn[WARM:], percentile / 100, method="higher")) + overhead_ms


def busy_ms(
    rate: float, shape: ArrayLike, mean_ms: float, growth: Sequence[float] = (1.0,), max_delay_ms: float = 0.0
) -> float:
    """Time in ms that one request keeps the server busy at a rate: the mean, or its share of the batches it comes in."""
    if len(growth) == 1 or rate <= 0:
        return mean_ms
    if rate * mean_ms * growth[-1] >= 1000 * len(growth):
        return mean_ms * growth[-1] / len(growth)
    return _bulk(rate, _as_tuple(shape), mean_ms, tuple(growth), max_delay_ms).busy / REQUESTS


@lru_cache(maxsize=256)
def _bulk(
    rate: float,
    shape: tuple[float, ...],
    mean_ms: float,
    growth: tuple[float, ...],
    max_delay_ms: float,
    requests: int = REQUESTS,
) -> Bulk:
    unit_arrivals, draws = _common(requests)
    times = [mean_ms * factor for factor in growth]
    return serve(unit_arrivals * (1000 / rate), times, _spread(shape, draws), max_delay_ms)


def _spread(shape: ArrayLike, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """A service time over the mean for each draw, by inverse transform."""
    ordered = np.sort(np.asarray(shape, dtype=np.float64))
    return np.asarray(ordered[np.minimum((draws * ordered.size).astype(np.intp), ordered.size - 1)])


def _as_tuple(shape: ArrayLike) -> tuple[float, ...]:
    return shape if isinstance(shape, tuple) else tuple(np.asarray(shape, dtype=np.float64).tolist())
