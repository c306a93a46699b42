"""A queue served in batches: how long each request stays, by the rule of corun.serve.batcher in virtual time.

One server takes up to B waiting requests together, oldest first, and answers them together S(n) later for n of them:

    closed = max(free, min(arrival of the oldest + max_delay, arrival of the B-th))
    batch  = those here by then, at most B          free = its end = closed + S(n) u

u is the batch's own factor of a service time's spread. With max_delay = 0 a free server waits for nobody. This is the
bulk-service queue of Bailey 1954 and Neuts 1967 ("A general class of bulk queues with Poisson input") with batches of
one and more, and with a time-out when max_delay > 0; for times that depend on the size its tail has no closed form. The
recursion is exact for given arrivals and takes as many steps as there are batches. B = 1 is Lindley's (corun.stats.queues).

Nothing is assumed of S: the time for one request may fall with the size, stay, or grow. More requests/s do not always
mean a later answer either: batches that are held fill sooner.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Bulk:
    """What came of a series of requests: (n,) sojourns, sizes of the batches in order, total time the server was busy."""

    sojourns: NDArray[np.float64]
    sizes: tuple[int, ...]
    busy: float


def serve(arrivals: ArrayLike, times: Sequence[float], factors: ArrayLike, max_delay: float = 0.0) -> Bulk:
    """Serve requests in batches of up to len(times); all times in one unit.

    arrivals: (n,) instants that do not decrease; the server is free before the first. times: S(1) .. S(B), >= 0.
    factors: (n,) u of the batch that request i is the oldest of. Raises ValueError for anything else.
    """
    instants = np.asarray(arrivals, dtype=np.float64)
    if (np.diff(instants) < 0).any():
        raise ValueError("arrivals must not decrease; sort them first")
    if not times or min(times) < 0 or max_delay < 0:
        raise ValueError("a batch of each size needs its time, and neither times nor delays are negative")
    at = instants.tolist()
    spread = np.broadcast_to(np.asarray(factors, dtype=np.float64), instants.shape).tolist()
    ends, sizes = _ends(at, times, spread, max_delay)
    busy = sum(times[size - 1] * spread[first] for first, size in _firsts(sizes))
    return Bulk(np.repeat(ends, sizes) - instants, tuple(sizes), busy)


def _ends(
    at: Sequence[float], times: Sequence[float], spread: Sequence[float], max_delay: float
) -> tuple[list[float], list[int]]:
    """End and size of every batch."""
    count, largest = len(at), len(times)
    ends: list[float] = []
    sizes: list[int] = []
    first, free = 0, float("-inf")
    while first < count:
        closed = at[first] + max_delay
        full = first + largest - 1
        if full < count and at[full] < closed:
            closed = at[full]
        if closed < free:
            closed = free
        after = bisect_right(at, closed, first + 1, min(first + largest, count))
        free = closed + times[after - first - 1] * spread[first]
        ends.append(free)
        sizes.append(after - first)
        first = after
    return ends, sizes


def _firsts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(number of its oldest request, size) of every batch."""
    firsts = np.cumsum([0, *sizes[:-1]]).tolist() if sizes else []
    return list(zip(firsts, sizes, strict=True))
