"""A FIFO single-server queue in closed vector form: no event loop, no clock, no state.

The waiting time of request i follows Lindley's recursion (Lindley 1952, "The theory of queues with a single
server"), which a running minimum solves without a loop:

    W[i] = max(0, W[i-1] + S[i-1] - A[i]),   A[i] = gap before arrival i
         = U[i] - min(U[0..i]),              U[i] = sum over j < i of (S[j] - A[j+1])

Whatever the arrival and service processes are (G/G/1), so the same function checks a confidence interval,
an arrival process or a plan. Every array may carry leading axes: one row is one independent queue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def waiting_times(arrivals: ArrayLike, service: ArrayLike) -> NDArray[np.float64]:
    """Return how long each request waits before its service starts; the queue is empty at the first arrival.

    arrivals: (..., n) non-decreasing instants; service: anything that broadcasts to it, same unit, >= 0.
    Raises ValueError when arrivals run backwards or a service time is negative.
    """
    instants = np.asarray(arrivals, dtype=np.float64)
    durations = np.broadcast_to(np.asarray(service, dtype=np.float64), instants.shape)
    gaps = np.diff(instants, axis=-1)
    if (gaps < 0).any():
        raise ValueError("arrivals must not decrease; sort them first")
    if (durations < 0).any():
        raise ValueError("a service time cannot be negative")
    walk = np.zeros_like(instants)
    np.cumsum(durations[..., :-1] - gaps, axis=-1, out=walk[..., 1:])
    return np.asarray(walk - np.minimum.accumulate(walk, axis=-1), dtype=np.float64)


def sojourn_times(arrivals: ArrayLike, service: ArrayLike) -> NDArray[np.float64]:
    """Return waiting plus service time of each request, shape and unit of `arrivals` (see waiting_times)."""
    return np.asarray(waiting_times(arrivals, service) + np.asarray(service, dtype=np.float64), dtype=np.float64)


def poisson_arrivals(rng: np.random.Generator, rate: float, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
    """Return Poisson arrival instants along the last axis of `shape`, `rate` a unit of time (exponential gaps)."""
    if rate <= 0:
        raise ValueError(f"the rate must be positive, got {rate}")
    return np.cumsum(rng.exponential(1 / rate, shape), axis=-1)


def mean_in_flight(starts: ArrayLike, ends: ArrayLike, edges: ArrayLike) -> NDArray[np.float64]:
    """Return the time-averaged number of requests in flight in each of the m windows between m + 1 edges.

    starts, ends: (n,) in the unit of `edges`, in any order; one that never ended carries an end beyond the last
    edge. Exact, not sampled (a sampling grid can fall in step with regular arrivals): with
    F(t) = sum (t - start)+ - sum (t - end)+ the mean over [a, b) is (F(b) - F(a)) / (b - a).
    Raises ValueError unless the edges increase.
    """
    bounds = np.asarray(edges, dtype=np.float64)
    widths = np.diff(bounds)
    if bounds.size < 2 or not (widths > 0).all():
        raise ValueError("windows need at least two increasing edges")
    entered = _elapsed(np.asarray(starts, dtype=np.float64), bounds)
    left = _elapsed(np.asarray(ends, dtype=np.float64), bounds)
    return np.asarray(np.diff(entered - left) / widths, dtype=np.float64)


def _elapsed(instants: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of (t - instant) over the instants at or before t, for each t of `at`."""
    ordered = np.sort(instants)
    passed = np.searchsorted(ordered, at, side="right")
    sums = np.concatenate([[0.0], np.cumsum(np.minimum(ordered, at.max()))])
    return np.asarray(passed * at - sums[passed], dtype=np.float64)
