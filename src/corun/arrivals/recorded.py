"""Arrivals that were recorded: traces, per-minute counts, and an earlier run replayed.

A trace shorter than the segment is repeated from its start, a longer one is cut; neither is stretched unless asked.
Two ways change a trace's mean rate, and they are not the same load:

    compressed   every gap divided by one factor: bursts keep their shape and get steeper
    thinned      each request kept with one probability: bursts keep their times and lose their height
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.arrivals.processes import Seconds, positive, require
from corun.errors import InputError

__all__ = ["MinuteCounts", "Replay", "Trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded arrivals: `offsets_s` (n, ascending, from 0) within one lap of `span_s`, repeated lap after lap.

    `keep` is the probability that a request survives thinning. `spread_s` moves each arrival by a uniform draw from
    [0, spread_s): for traces whose stamps were truncated to whole seconds.
    """

    name: ClassVar[str] = "trace"
    offsets_s: Seconds
    span_s: float
    label: str = "trace"
    keep: float = 1.0
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        offsets_s = _frozen(self.offsets_s)
        object.__setattr__(self, "offsets_s", offsets_s)
        ascending = bool(np.isfinite(offsets_s).all() and (np.diff(offsets_s) >= 0).all())
        require(
            self.label,
            (offsets_s.size >= 1, "the trace holds no arrival"),
            (ascending, "the arrivals are not finite and ascending"),
            positive(self.span_s, "span_s", "s"),
            (not ascending or not offsets_s.size or 0 <= offsets_s[0] <= offsets_s[-1] <= self.span_s,
             f"the arrivals do not lie within the span of {self.span_s!r} s"),
            (0 < self.keep <= 1, f"keep must be in 0..1 (a probability), not {self.keep!r}"),
            (0 <= self.spread_s < math.inf, f"spread_s must be at least 0 s, not {self.spread_s!r}"),
        )  # fmt: skip

    @property
    def rate(self) -> float:
        return self.offsets_s.size * self.keep / self.span_s

    @property
    def gaps_s(self) -> Seconds:
        """The n gaps of one lap, the last one leading to the next lap's first arrival."""
        return np.diff(self.offsets_s, append=self.offsets_s[0] + self.span_s)

    def compressed(self, rate: float) -> Self:
        """The trace with every gap scaled so that the mean rate becomes `rate`."""
        require(self.label, positive(rate, "rate", "requests/s"))
        factor = rate / self.rate
        return replace(
            self,
            offsets_s=np.minimum(self.offsets_s / factor, self.span_s / factor),
            span_s=self.span_s / factor,
            spread_s=self.spread_s / factor,
        )

    def thinned(self, rate: float) -> Self:
        """The trace with requests dropped at random so that the mean rate becomes `rate`."""
        return replace(self, keep=self.keep * _share(self.label, rate, self.rate))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        marks, places = rng.spawn(2)
        laps = np.arange(math.ceil(duration_s / self.span_s) or 1, dtype=np.float64) * self.span_s
        stamps = (laps[:, None] + self.offsets_s).ravel()
        stamps = stamps[stamps < duration_s]
        if self.keep < 1:
            stamps = stamps[marks.random(stamps.size) < self.keep]
        if self.spread_s > 0:
            stamps = np.sort(stamps + places.random(stamps.size) * self.spread_s)
        return stamps[stamps < duration_s]


@dataclass(frozen=True)
class MinuteCounts:
    """Counts per bin (a minute unless compressed), repeated bin after bin.

    Arrivals are uniform inside their bin, which is what a Poisson process does once its count is given.
    """

    name: ClassVar[str] = "counts"
    counts: tuple[int, ...]
    bin_s: float = 60.0
    label: str = "counts"
    keep: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.label,
            (sum(self.counts) > 0, "the counts hold no arrival"),
            (min(self.counts, default=0) >= 0, "a count is negative"),
            positive(self.bin_s, "bin_s", "s"),
            (0 < self.keep <= 1, f"keep must be in 0..1 (a probability), not {self.keep!r}"),
        )

    @property
    def rate(self) -> float:
        return sum(self.counts) * self.keep / (len(self.counts) * self.bin_s)

    def compressed(self, rate: float) -> Self:
        """The counts played faster (or slower) so that the mean rate becomes `rate`."""
        require(self.label, positive(rate, "rate", "requests/s"))
        return replace(self, bin_s=self.bin_s * self.rate / rate)

    def thinned(self, rate: float) -> Self:
        """The counts with requests dropped at random so that the mean rate becomes `rate`."""
        return replace(self, keep=self.keep * _share(self.label, rate, self.rate))

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        [places] = rng.spawn(1)
        bins = np.arange(math.ceil(duration_s / self.bin_s) or 1)
        counts = np.asarray(self.counts, dtype=np.int64)[bins % len(self.counts)]
        if self.keep < 1:
            counts = rng.binomial(counts, self.keep)
        starts_s = np.repeat(bins.astype(np.float64), counts)
        stamps = np.sort((starts_s + places.random(starts_s.size)) * self.bin_s)
        return stamps[stamps < duration_s]


@dataclass(frozen=True, eq=False)
class Replay:
    """Exactly the due instants of an earlier run, cut at the segment's end, never repeated."""

    name: ClassVar[str] = "replay"
    rate: ClassVar[None] = None
    stamps_s: Seconds
    label: str = "replay"

    def __post_init__(self) -> None:
        stamps_s = _frozen(self.stamps_s)
        object.__setattr__(self, "stamps_s", stamps_s)
        planned = bool((np.isfinite(stamps_s) & (stamps_s >= 0)).all())
        require(
            self.label,
            (stamps_s.size >= 1, "there is no arrival to replay"),
            (planned, "some requests have no due instant (a closed loop?): only open loops can be replayed"),
        )
        object.__setattr__(self, "stamps_s", _frozen(np.sort(stamps_s)))

    @classmethod
    def from_ns(cls, intended_ns: NDArray[np.int64], start_ns: int = 0, label: str = "replay") -> Self:
        """From recorded intended instants in ns and the instant their segment began; exact below 26 days."""
        return cls((np.asarray(intended_ns, dtype=np.int64) - np.int64(start_ns)) / 1e9, label)

    def draw(self, rng: np.random.Generator, duration_s: float) -> Seconds:
        return self.stamps_s[self.stamps_s < duration_s]


def _frozen(values: ArrayLike) -> Seconds:
    """A private, read-only float64 copy."""
    copy = np.array(values, dtype=np.float64).reshape(-1)
    copy.setflags(write=False)
    return copy


def _share(label: str, wanted: float, offered: float) -> float:
    """The probability that thins a load of `offered` to `wanted` requests/s."""
    require(label, positive(wanted, "rate", "requests/s"))
    if wanted > offered:
        raise InputError(
            f"{label}: thinning cannot raise the rate from {offered:.4g} to {wanted:.4g} requests/s;"
            " compress time instead"
        )
    return wanted / offered
