"""Made requests whose predictability is known, to check that models find what is there and nothing else.

    poisson     independent exponential gaps, Poisson sizes: only the rate can be known; ideal skill 0
    seasonal    logs follow a sine of 24 requests plus noise: the naive forecast of one season ago carries the noise
                twice, so the ideal skill against it is 1 - 1/sqrt(2) = 0.29
    ar          logs follow an AR(1) with coefficient -0.8: ideal against the last-but-one value is 0.29

An AR(1) with a positive coefficient cannot show much: at any of them the last value, the mean or an EWMA comes within
1 - sqrt(3)/2 = 13 % of the ideal forecast. A negative one alternates, which no naive forecast follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corun.predict.data import NS, Requests

__all__ = ["MAKERS", "ar", "poisson", "seasonal"]

Floats = NDArray[np.float64]

SCALES: Final = np.array([0.2, 500.0, 100.0])
"""Gap in s, request tokens, response tokens."""

PERIOD: Final = 24
COEFFICIENT: Final = -0.8


def poisson(rows: int, seed: int = 0) -> Requests:
    """Independent requests: exponential gaps with a mean of 0.2 s, Poisson token counts."""
    rng = np.random.default_rng(seed)
    gap_s, prompt, answer = SCALES
    tokens = rng.poisson((prompt, answer), (rows, 2)).astype(np.float64)
    return _requests(rng.exponential(gap_s, rows), tokens[:, 0], tokens[:, 1])


def seasonal(rows: int, seed: int = 0, noise: float = 0.2) -> Requests:
    """All three quantities swing by a factor of e^0.8 either way every 24 requests; `noise` is the deviation of logs."""
    rng = np.random.default_rng(seed)
    wave = 0.8 * np.sin(2 * np.pi * np.arange(rows) / PERIOD)[:, None]
    values = SCALES * np.exp(wave + noise * rng.normal(size=(rows, 3)))
    return _requests(*values.T)


def ar(rows: int, seed: int = 0) -> Requests:
    """Logs are 0.5 z with z an AR(1) of coefficient -0.8 and variance 1, independent for the three quantities."""
    rng = np.random.default_rng(seed)
    shocks = np.sqrt(1 - COEFFICIENT**2) * rng.normal(size=(rows, 3))
    z = np.empty((rows, 3))
    z[0] = rng.normal(size=3)
    for row in range(1, rows):
        z[row] = COEFFICIENT * z[row - 1] + shocks[row]
    return _requests(*(SCALES * np.exp(0.5 * z)).T)


MAKERS: Final[dict[str, Callable[[int, int], Requests]]] = {"poisson": poisson, "seasonal": seasonal, "ar": ar}


def _requests(gaps_s: Floats, prompt: Floats, answer: Floats) -> Requests:
    """Whole tokens; every response is complete at once, so that what is tested is the forecast and not the lag."""
    t_ns = np.rint(np.cumsum(gaps_s) * NS).astype(np.int64)
    tokens = [np.maximum(np.rint(values), 0.0).astype(np.float64) for values in (prompt, answer)]
    return Requests(t_ns, tokens[0], tokens[1], np.zeros(t_ns.size), "burstgpt")
