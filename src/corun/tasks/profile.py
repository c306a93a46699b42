"""What is known of a model on this hardware: its latency by batch size and rate, memory, and what training costs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from corun.stats.percentiles import FLOORS

PERCENTILES: Final = (50, 90, 95, 99)
LIVE_LEAST: Final = 30
LIVE_HALF: Final = 100
LIVE_RANGE: Final = (0.25, 8.0)
FADE_S: Final = 3600.0


@dataclass(frozen=True)
class Point:
    """One measured load: `n` answered requests at `rate` requests/s (open loop, Poisson), sojourn in ms.

    A percentile is None below the number of requests that supports it. lost: requests refused, failed or lost.
    slowdown: the training job's steps/s alone over those beside this load; None without training.
    """

    rate: float
    n: int
    mean_ms: float
    max_ms: float
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_batch: int = 1
    training: bool = False
    lost: int = 0
    slowdown: float | None = None

    def bound_ms(self, name: str) -> float:
        """The percentile called `p99_ms`, or the next larger thing known: a higher percentile or the maximum.

        Infinite when nothing was answered.
        """
        if not self.n:
            return math.inf
        if name != "max_ms":
            least = int(name.removeprefix("p").removesuffix("_ms"))
            for percentile in PERCENTILES:
                value: float | None = getattr(self, f"p{percentile}_ms")
                if percentile >= least and value is not None:
                    return value
        return self.max_ms

    def supports(self, name: str) -> bool:
        """Whether that percentile was measured itself."""
        return name == "max_ms" or self.n >= FLOORS[float(name.removeprefix("p").removesuffix("_ms"))]


@dataclass(frozen=True)
class Profile:
    """Measurements of one model (with its options) on one machine, one replica.

    batch_ms: median time to compute a batch of each size, nothing else waiting. cpu_ms: CPU time of the server for one
    request. trainer: what trained beside it ("" = nothing). measured: ISO date.
    """

    model: str
    machine: str
    device: str
    threads: int
    points: tuple[Point, ...]
    batch_ms: Mapping[int, float] = field(default_factory=dict)
    cpu_ms: float = 0.0
    rss_mib: float = 0.0
    gpu_mib: float | None = None
    weights: str = "random"
    trainer: str = ""
    measured: str = ""

    def max_batches(self) -> tuple[int, ...]:
        """Batch limits it was measured with, ascending."""
        return tuple(sorted({point.max_batch for point in self.points}))

    def curve(self, max_batch: int, training: bool) -> tuple[Point, ...]:
        """Its points with that batch limit, beside training or alone, by rate; windows without a request say nothing."""
        chosen = [
            point
            for point in self.points
            if (point.max_batch, point.training) == (max_batch, training) and (point.n or point.lost)
        ]
        return tuple(sorted(chosen, key=lambda point: point.rate))

    def latency_ms(self, name: str, rate: float, max_batch: int = 1, training: bool = False) -> float | None:
        """The bound called `name` ("p99_ms") at `rate` requests/s to one replica; None above the highest measured rate.

        Between two measured rates it is interpolated; latency never falls with the rate, so a dip is filled from below.
        """
        return _at(rate, [(point.rate, point.bound_ms(name)) for point in self.curve(max_batch, training)])

    def supports(self, name: str, rate: float, max_batch: int = 1, training: bool = False) -> bool:
        """Whether `latency_ms` at that rate rests on points with enough requests for it, not on their maxima."""
        points = self.curve(max_batch, training)
        above = [point for point in points if point.rate >= rate]
        below = [point for point in points if point.rate < rate]
        return all(point.supports(name) for point in above[:1] + below[-1:])

    def mean_ms(self, rate: float, max_batch: int = 1, training: bool = False) -> float | None:
        """The mean sojourn, read the same way."""
        return _at(rate, [(point.rate, point.mean_ms) for point in self.curve(max_batch, training)])

    def slowdown(self, rate: float, max_batch: int = 1) -> float | None:
        """How many times slower the training job is beside `rate` requests/s, at most; None when that is not known.

        Above the highest measured rate it is read there.
        """
        pairs = [(point.rate, point.slowdown) for point in self.curve(max_batch, training=True) if point.slowdown]
        return _at(min(rate, pairs[-1][0]), pairs) if pairs else None

    def top_rate(self, max_batch: int, training: bool) -> float | None:
        """The highest rate it was measured at without losing requests."""
        return max((point.rate for point in self.curve(max_batch, training) if not point.lost), default=None)

    def slower(self, factor: float) -> Profile:
        """The same with every latency times `factor`."""
        names = ("mean_ms", "max_ms", *(f"p{percentile}_ms" for percentile in PERCENTILES))

        def scaled(point: Point) -> Point:
            values = {name: getattr(point, name) for name in names}
            return replace(point, **{name: value * factor for name, value in values.items() if value is not None})

        return replace(self, points=tuple(scaled(point) for point in self.points))


def _at(rate: float, pairs: Sequence[tuple[float, float]]) -> float | None:
    """Value at `rate` of a non-decreasing curve through (rate, value) pairs in order of rate."""
    if not pairs or rate > pairs[-1][0] * (1 + 1e-9):
        return None
    low_rate, low = 0.0, pairs[0][1]
    for high_rate, value in pairs:
        high = max(low, value)
        if rate <= high_rate:
            if math.isinf(high):
                return high
            share = (rate - low_rate) / (high_rate - low_rate) if high_rate > low_rate else 1.0
            return low + (high - low) * share
        low_rate, low = high_rate, high
    return low


def live_factor(
    profile: Profile, live_mean_ms: float, requests: int, rate: float, max_batch: int, training: bool
) -> float | None:
    """How much slower than profiled the running service is: live mean over the profile's at `rate` per replica.

    The factor grows with the number of live requests, r ** (n / (n + 100)), so that few requests change little; it is
    kept within a quarter to eight times. None below thirty requests or at a rate never measured.
    """
    expected = profile.mean_ms(rate, max_batch, training)
    if requests < LIVE_LEAST or not expected or live_mean_ms <= 0:
        return None
    ratio = min(max(live_mean_ms / expected, LIVE_RANGE[0]), LIVE_RANGE[1])
    return math.pow(ratio, requests / (requests + LIVE_HALF))


def faded(factor: float, age_s: float) -> float:
    """What is left of a factor that was seen age_s ago: half of it (on a logarithmic scale) after an hour.

    A model that was dropped because it ran slower than profiled is not taken back the moment it is gone, but may be
    tried again later: what slowed it may have passed.
    """
    return math.pow(factor, 0.5 ** (max(age_s, 0.0) / FADE_S))


def to_json(profile: Profile) -> dict[str, Any]:
    """As plain JSON values."""
    from dataclasses import asdict

    return {**asdict(profile), "batch_ms": {str(size): ms for size, ms in profile.batch_ms.items()}}


def from_json(value: Mapping[str, Any]) -> Profile:
    """The profile of `to_json`; TypeError or KeyError when it is none."""
    return Profile(
        **{
            **value,
            "points": tuple(Point(**point) for point in value["points"]),
            "batch_ms": {int(size): ms for size, ms in value["batch_ms"].items()},
        }
    )
