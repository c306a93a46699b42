"""Searching with few runs: bisection of a threshold, and the sets worth looking at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

ENUMERATE: Final = 8


def bisect_count(low: int, high: int, fits: Callable[[int], bool], guess: int | None = None) -> int:
    """The largest k in [low, high] with fits(k), or low - 1; fits must be true up to a threshold and false after it.

    Starts at `guess` and gallops from there (1, 2, 4, ...), so a good guess costs two calls; at most
    2 log2(high - low + 1) + 2 calls. Each k is asked once.
    """
    known_good, known_bad = low - 1, high + 1
    at, step = min(high, max(low, guess if guess is not None else (low + high) // 2)), 1
    while known_bad - known_good > 1:
        if fits(at):
            known_good = at
        else:
            known_bad = at
        if known_good < low:
            at, step = max(low, known_bad - step), 2 * step
        elif known_bad > high:
            at, step = min(high, known_good + step), 2 * step
        else:
            at = (known_good + known_bad) // 2
        at = min(known_bad - 1, max(known_good + 1, at))
    return known_good


def bisect_rate(low: float, high: float, fits: Callable[[float], bool], ratio: float = 1.01) -> float:
    """The largest rate in [low, high] with fits(rate) to within `ratio`, 0 when not even low fits.

    log2(log(high / low) / log(ratio)) + 2 calls. Raises ValueError unless 0 < low <= high.
    """
    if not 0 < low <= high:
        raise ValueError(f"rates must satisfy 0 < low <= high, got {low} and {high}")
    if not fits(low):
        return 0.0
    if fits(high):
        return high
    while high / low > ratio:
        middle = (low * high) ** 0.5
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def subsets(items: Sequence[T], size: int, score: Callable[[T], float]) -> list[tuple[T, ...]]:
    """All sets of a size; of more than ENUMERATE items only those of the best by `score` and its neighbours."""
    if len(items) <= ENUMERATE:
        return list(itertools.combinations(items, size))
    ranked = sorted(items, key=score, reverse=True)
    inside, outside = ranked[:size], ranked[size : size + 3]
    swapped = [
        tuple(item for item in (*inside[:place], *inside[place + 1 :], other))
        for place in range(max(0, size - 3), size)
        for other in outside
    ]
    return [tuple(inside), *swapped]
