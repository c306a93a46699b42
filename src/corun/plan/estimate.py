"""What a set of services will do under one policy, with how far that may be trusted: everything measured as one model.

    alone       service times of each model, mean and shape, and what the way to the server and back adds
    beside      slowdown of the mean by corun.plan.interference, shape from the windows beside the trainer
    tail        corun.plan.tail on mean * (1 + kappa (slowdown - 1)); kappa fitted on the measured percentiles
    batches     of a kind served in batches a time counts over the curve's at its size: S(n) = mean * growth(n)

Uncertainty is the model's own record: r = log(measured / predicted percentile) of every service in every window of the
policy. With a prior of NU0 windows of spread SIGMA0 (few windows must not look certain),

    sigma^2 = (NU0 SIGMA0^2 + sum r^2) / (NU0 + n),    percentile in predicted * exp(+- t(NU0 + n) sigma)

and P(promise kept) is Student's t at log(bound / predicted) / sigma. Residuals hold the windows' own noise as well, so
the interval is that of what one window would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from corun.plan.interference import Interference, Observed, Running, Slowed, fit
from corun.plan.measured import Condition, Curve, Sample, Window
from corun.plan.question import Candidate, Kind, Slo
from corun.plan.tail import busy_ms, sojourn_percentile

NU0: Final = 3.0
SIGMA0: Final = 0.25
KAPPAS: Final = np.linspace(0.0, 4.0, 21)
FAR: Final = 1.5
LEVEL: Final = 0.90


@dataclass(frozen=True)
class Base:
    """A model alone: mean service time, service times over that mean (n,), and the sojourn's rest.

    growth: time of a batch of 1 .. B over that of one; mean_ms is that of one then. max_delay_ms: how long it is held.
    """

    mean_ms: float
    shape: tuple[float, ...]
    overhead_ms: float
    growth: tuple[float, ...] = (1.0,)
    max_delay_ms: float = 0.0

    def busy_ms(self, rate: float) -> float:
        """What a request keeps the server busy for, at a rate."""
        return busy_ms(rate, self.shape, self.mean_ms, self.growth, self.max_delay_ms)

    def singles_ms(self, sample: Sample) -> NDArray[np.float64]:
        """Service times as if every request had come alone: each over the growth at the size of its batch."""
        times = np.asarray(sample.services_ms, dtype=np.float64)
        if len(self.growth) == 1 or len(sample.batches) != times.size:
            return times
        sizes = np.clip(np.asarray(sample.batches, dtype=np.intp), 1, len(self.growth))
        return np.asarray(times / np.asarray(self.growth)[sizes - 1])


@dataclass(frozen=True)
class Tail:
    """A predicted percentile in ms with its interval at LEVEL, and the probability that the bound is kept."""

    name: str
    predicted_ms: float
    low_ms: float
    high_ms: float
    kept: float


@dataclass(frozen=True)
class Estimate:
    """The model of one policy. spread: sigma of log(measured / predicted); freedom: its degrees of freedom."""

    slo: Slo
    bases: Mapping[str, Base]
    beside: Mapping[str, tuple[float, ...]]
    interference: Interference
    kappa: float = 1.0
    spread: float = SIGMA0
    freedom: float = NU0

    def tails(self, candidates: Sequence[Candidate]) -> list[Tail]:
        """The promised percentile of every service when these run together."""
        return [
            self._tail(one.name, self.slo, ms) for one, ms in zip(candidates, self.points(candidates), strict=True)
        ]

    def points(self, candidates: Sequence[Candidate]) -> list[float]:
        """Predicted percentiles in ms without intervals."""
        return self._points(self.running(candidates), self.slo.percentile)

    def kept(self, candidates: Sequence[Candidate]) -> float:
        """Probability that the service most at risk keeps its promise; 1 for nobody."""
        return min((tail.kept for tail in self.tails(candidates)), default=1.0)

    def training(self, candidates: Sequence[Candidate]) -> float:
        """Training speed over alone."""
        return self.interference.training_ratio(self.running(candidates))

    def running(self, candidates: Sequence[Candidate]) -> list[Running]:
        return [Running(one.kind, one.rate, self.bases[one.kind].busy_ms(one.rate)) for one in candidates]

    def _points(self, running: Sequence[Running], percentile: float) -> list[float]:
        slow = self.interference.slowdowns(running)
        return [self._point(one, factor, percentile) for one, factor in zip(running, slow, strict=True)]

    def _point(self, one: Running, slowdown: float, percentile: float) -> float:
        base = self.bases[one.model]
        mean_ms = base.mean_ms * (1 + self.kappa * (slowdown - 1))
        shape = self.beside.get(one.model, base.shape)
        return sojourn_percentile(
            one.rate, shape, mean_ms, base.overhead_ms, percentile, base.growth, base.max_delay_ms
        )

    def _tail(self, name: str, slo: Slo, point_ms: float) -> Tail:
        if not math.isfinite(point_ms):
            return Tail(name, point_ms, point_ms, point_ms, 0.0)
        stretch = math.exp(float(special.stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.spread)
        kept = float(special.stdtr(self.freedom, math.log(slo.bound_ms / point_ms) / self.spread))
        return Tail(name, point_ms, point_ms / stretch, point_ms * stretch, kept)


@dataclass(frozen=True)
class Evidence:
    """Windows that an estimate is made from: services alone, and everything beside the trainer under one policy.

    job "" = nobody trains: the windows with several services are then `together`'s. curves: by model, of those served in
    batches.
    """

    slo: Slo
    cores: int
    threads: int
    alone: tuple[Window, ...]
    together: tuple[Window, ...]
    train_samples_per_s: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @cached_property
    def bases(self) -> dict[str, Base]:
        models = sorted({sample.model for window in self.alone for sample in window.samples})
        return {
            model: _base([sample for sample in _samples(self.alone) if sample.model == model], *self._growth(model))
            for model in models
        }

    def _growth(self, kind: str) -> tuple[tuple[float, ...], float]:
        """How the time of a batch grows with its size, and how long it is held."""
        served = Kind.parse(kind)
        curve = self.curves.get(served.model)
        if served.max_batch == 1 or curve is None:
            return (1.0,), 0.0
        times = curve.times_ms(served.max_batch)
        return tuple(time / times[0] for time in times), served.max_delay_ms

    def estimate(self) -> Estimate:
        """Fit everything."""
        usable = [window for window in self.together if not window.fault and window.samples]
        model = fit(self.cores, self.threads, self._observed(usable), self._slowed(usable))
        plain = Estimate(self.slo, self.bases, self._shapes(usable), model)
        kappa, residuals = self._stretch(plain, usable)
        freedom = NU0 + len(residuals)
        spread = math.sqrt((NU0 * SIGMA0**2 + float((residuals**2).sum())) / freedom)
        return Estimate(self.slo, self.bases, plain.beside, model, kappa, spread, freedom)

    def _running(self, window: Window) -> tuple[Running, ...]:
        return tuple(Running(one.model, one.rate, self.bases[one.model].busy_ms(one.rate)) for one in window.samples)

    def _observed(self, windows: Iterable[Window]) -> list[Observed]:
        found = []
        for window in windows:
            running = self._running(window)
            shares = [
                _mean(_shares_ms(one), other.service_ms) for one, other in zip(window.samples, running, strict=True)
            ]
            busy = tuple(min(1.0, one.rate * ms / 1000) for one, ms in zip(running, shares, strict=True))
            for index, sample in enumerate(window.samples):
                base, count = self.bases[sample.model], len(sample.services_ms)
                if count:
                    slowdown = float(base.singles_ms(sample).mean()) / base.mean_ms
                    found.append(Observed(running, index, max(1.0, slowdown), busy, count))
        return found

    def _slowed(self, windows: Iterable[Window]) -> list[Slowed]:
        if not self.train_samples_per_s:
            return []
        return [
            Slowed(self._running(window), window.samples_per_s / self.train_samples_per_s)
            for window in windows
            if window.samples_per_s is not None
        ]

    def _shapes(self, windows: Sequence[Window]) -> dict[str, tuple[float, ...]]:
        """Service times over their mean beside the trainer, from the windows with the fewest other services."""
        found: dict[str, tuple[float, ...]] = {}
        if not self.threads:
            return found
        for window in sorted(windows, key=lambda window: len(window.samples), reverse=True):
            for sample in window.samples:
                if len(sample.services_ms) >= 10:
                    found[sample.model] = _shape(self.bases[sample.model].singles_ms(sample))
        return found

    def _stretch(self, plain: Estimate, windows: Sequence[Window]) -> tuple[float, NDArray[np.float64]]:
        """kappa with the smallest sum of |r|, far ones counted as FAR, and the residuals under it."""
        rows = [(self._running(window), window.samples) for window in windows]
        if not rows:
            return 1.0, np.empty(0)
        best: tuple[float, float, NDArray[np.float64]] = (float("inf"), 1.0, np.empty(0))
        slow = [plain.interference.slowdowns(running) for running, _ in rows]
        for kappa in sorted(KAPPAS, key=lambda kappa: abs(kappa - 1)):
            tried = Estimate(plain.slo, plain.bases, plain.beside, plain.interference, float(kappa))
            found = []
            for (running, samples), factors in zip(rows, slow, strict=True):
                for one, sample, factor in zip(running, samples, factors, strict=True):
                    found.append(_residual(sample, tried._point(one, factor, self.slo.percentile), self.slo))
            residuals = np.array([value for value in found if value is not None])
            total = float(np.abs(residuals).sum())
            if total < best[0] - 1e-9:
                best = (total, float(kappa), residuals)
        return best[1], best[2]


def alone_condition(candidate: Candidate) -> Condition:
    """The service by itself."""
    return Condition(((candidate.kind, candidate.rate),))


def _samples(windows: Iterable[Window]) -> list[Sample]:
    return [sample for window in windows for sample in window.samples]


def _base(samples: Sequence[Sample], growth: tuple[float, ...], max_delay_ms: float) -> Base:
    unit = Base(1.0, (1.0,), 0.0, growth, max_delay_ms)
    services = np.concatenate([unit.singles_ms(sample) for sample in samples])
    mean_ms = float(services.mean())
    shape = tuple((services / mean_ms).tolist())
    lowest = min(samples, key=lambda sample: sample.rate)
    plain = sojourn_percentile(lowest.rate, shape, mean_ms, 0.0, 50, growth, max_delay_ms)
    median = float(np.median(lowest.sojourns_ms))
    overhead = median - plain if math.isfinite(median) and math.isfinite(plain) else 0.0
    return Base(mean_ms, shape, max(0.0, overhead), growth, max_delay_ms)


def _shape(times: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple((times / times.mean()).tolist())


def _shares_ms(sample: Sample) -> NDArray[np.float64]:
    """Each request's part of the time of its batch."""
    times = np.asarray(sample.services_ms, dtype=np.float64)
    return times / np.asarray(sample.batches) if len(sample.batches) == times.size else times


def _mean(values: NDArray[np.float64], otherwise: float) -> float:
    return float(values.mean()) if values.size else otherwise


def percentile_of(sojourns_ms: Sequence[float] | NDArray[np.float64], percentile: float) -> float:
    """The exact percentile whatever the number of samples; inf when so many were not answered, NaN without any."""
    values = np.asarray(sojourns_ms, dtype=np.float64)
    return float(np.quantile(values, percentile / 100, method="higher")) if values.size else float("nan")


def _residual(sample: Sample, predicted_ms: float, slo: Slo) -> float | None:
    measured = percentile_of(sample.sojourns_ms, slo.percentile)
    if math.isnan(measured):
        return None
    if not math.isfinite(measured) or not math.isfinite(predicted_ms):
        return 0.0 if measured == predicted_ms else math.copysign(FAR, measured - predicted_ms)
    return float(np.clip(math.log(measured / predicted_ms), -FAR, FAR))
