"""The original research code's "Poisson", faults included: for comparison with its figures and to test the validator.

For each second it draws a Poisson count p and spaces p requests evenly, 1/p s apart; a second with p = 0 vanishes
instead of staying empty; and every client process seeds its generator with 6, so that all of them fire in step.
Gaps inside a second are equal (CV 0.1 at 100 requests/s, lag-1 correlation 0.99), so hardly any queue ever forms:
M/D/1 at utilisation 0.8 shows a p99 of 8 ms where true Poisson arrivals give 92 ms. Never a default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from corun.arrivals.processes import Seconds, require

__all__ = ["Legacy"]

ORIGINAL_SEED = 6


@dataclass(frozen=True)
class Legacy:
    """A Poisson count per second, evenly spaced, from a seed of its own that all clients share."""

    name: ClassVar[str] = "legacy"
    rate: float
    seed: int = ORIGINAL_SEED

    def __post_init__(self) -> None:
        require(
            self.name,
            (0.1 <= self.rate < math.inf, f"rate must be at least 0.1 requests/s, not {self.rate!r}"),
            (0 <= self.seed < 2**32, f"seed must be in 0..2^32-1, not {self.seed!r}"),
        )

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        """The same arrivals whatever `rng` is: that is the fault this class reproduces."""
        source = np.random.RandomState(self.seed)
        counts = np.empty(0, dtype=np.int64)
        while np.count_nonzero(counts) < duration_s:
            counts = np.concatenate([counts, source.poisson(self.rate, math.ceil(duration_s) + 8)])
        counts = counts[counts > 0]
        gaps = np.repeat(1 / counts, counts)
        stamps = np.cumsum(gaps) - gaps
        return stamps[stamps < duration_s]
